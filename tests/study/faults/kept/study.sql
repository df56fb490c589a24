BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'digits-digits-cnn-eacf9f014b');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'config','"{\"format\": 2, \"version\": \"0.2.0.dev0\", \"options\": {\"methods\": [\"batch\"], \"batch_sizes\": [32], \"seeds\": 1, \"budget\": 96, \"lr\": 0.1}, \"revisions\": {}}"');
INSERT INTO "study_user_attributes" VALUES(2,1,'identity','{"data": {"train": {"labels": "dd1fa038160a46caacbc1dc2", "shape": [1, 8, 8], "means": [4.59375, 4.53125, 4.796875, 4.734375, 4.015625, 4.9375, 5.046875, 4.21875, 5.546875, 4.515625, 5.0625, 4.28125, 4.296875, 5.421875, 4.71875, 4.96875, 5.421875, 4.78125, 4.234375, 4.953125, 5.8125, 5.484375, 4.109375, 4.140625, 5.765625, 4.078125, 5.6875, 4.546875, 4.265625, 4.640625, 5.328125, 5.640625]}, "validation": {"labels": "bca69855409fc206120445f8", "shape": [1, 8, 8], "means": [4.984375, 4.03125, 4.203125, 5.203125, 5.15625, 4.171875, 4.5625, 4.515625, 5.265625, 4.703125, 5.21875, 4.0625, 5.078125, 6.109375, 4.515625, 4.59375, 4.828125, 4.96875, 4.203125, 4.703125, 5.375, 5.515625, 4.5, 4.15625, 4.0, 5.046875, 4.9375, 4.515625, 5.015625, 5.359375, 5.359375, 4.15625]}, "test": {"labels": "a3720018a24ce3bf9b8f0191", "shape": [1, 8, 8], "means": [5.375, 5.15625, 5.046875, 5.640625, 5.078125, 4.203125, 4.96875, 4.640625, 5.484375, 4.484375, 4.90625, 6.296875, 5.015625, 5.40625, 5.421875, 4.359375, 5.265625, 4.8125, 4.0, 5.625, 5.640625, 4.328125, 4.625, 4.625, 4.078125, 5.125, 5.296875, 4.625, 4.484375, 2.890625, 4.078125, 5.15625]}}, "model": {"layers": "ee67b5533c53ead1993d1327", "settings": "5a26eab6b4e2967b8a4e1b2a", "output": [-0.25177013874053955, 0.14636942744255066, 0.08552105724811554, 0.3601449728012085, -0.037573203444480896, 0.1762583702802658, 0.08812226355075836, -0.09460580348968506, 0.06499824672937393, -0.34852737188339233, -0.007159486413002014, 0.03455790877342224, -0.15359407663345337, 0.40587353706359863, 0.14553609490394592, 0.05870271474123001, -0.18839989602565765, -0.3227725625038147, 0.10455294698476791, -0.2821601629257202]}}');
INSERT INTO "study_user_attributes" VALUES(3,1,'environment','{"python": "3.11"}');
INSERT INTO "study_user_attributes" VALUES(4,1,'data','{"chance": 0.1, "chance_loss": 2.302585092994046, "data_summary": "digits: 1078 training, 269 validation and 450 test examples of 10 classes, 1x8x8 inputs"}');
INSERT INTO "study_user_attributes" VALUES(5,1,'costs','[{"method": "batch", "batch_size": 32, "step_seconds": 0.016367600000194216, "step_ratio": 1.0, "step_ratio_low": 1.0, "step_ratio_high": 1.0, "memory_bytes": 994052, "memory_ratio": 1.0, "error": null}]');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_heartbeats" VALUES(1,1,'2026-11-28 23:10:49');
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'slot','{"batch_size": 32, "lr": 0.1, "method": "batch", "phase": "final", "seed": 0}');
INSERT INTO "trial_user_attributes" VALUES(2,1,'owner','"a|b|c|1|2"');
INSERT INTO "trial_user_attributes" VALUES(3,1,'result','"{\"key\": {\"phase\": \"final\", \"method\": \"batch\", \"batch_size\": 32, \"lr\": 0.1, \"seed\": 0}, \"state\": \"finished\", \"error\": null, \"validation_accuracy\": 0.19330855018587362, \"validation_loss\": 2.2368683726371, \"test_accuracy\": 0.21777777777777776, \"test_loss\": 2.242766791449653, \"train_eval_gap\": 0.10644708573818207, \"best_step\": null, \"seconds\": 0.18358439800067572, \"validation_seconds\": 0.07221269000001485, \"curve\": [{\"examples\": 32, \"train_loss\": 2.3484692573547363, \"validation_accuracy\": null}, {\"examples\": 64, \"train_loss\": 2.2399415969848633, \"validation_accuracy\": null}, {\"examples\": 96, \"train_loss\": 2.266038656234741, \"validation_accuracy\": 0.19330855018587362}]}"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,1.9330855018587361771e-01,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-28 23:10:49.397525','2026-11-28 23:10:55.924789');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
