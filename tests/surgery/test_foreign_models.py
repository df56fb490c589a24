"""Models that others wrote: classification, segmentation and speech, from small configurations."""

import copy
import warnings

import pytest
import torch
from torch import nn

import normkit
from normkit.inspection.graph import producers
from normkit.inspection.norms import is_batchnorm, is_norm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever the imports of others warn about
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return transformers.ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def mobilenet():
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3)
    return transformers.MobileNetV2ForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def conformer():
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=3, num_labels=3, classifier_proj_size=8,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForSequenceClassification(config), {"input_values": torch.randn(2, 400)}


CASES = {  # batch norms, of which a trace finds the layer before, all norms
    resnet: (11, 11, 11),
    mobilenet: (52, 0, 52),
    segformer: (1, 0, 10),
    conformer: (2, 2, 15),
}


@pytest.fixture(params=CASES, ids=lambda build: build.__name__)
def case(request):
    """A model with statistics and affine parameters as after training, and one batch."""
    torch.manual_seed(0)
    model, batch = request.param()
    for module in model.modules():
        if is_batchnorm(module):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval(), batch, CASES[request.param]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_norms_and_the_layers_before_them_are_found(case):
    model, _, counts = case
    found = producers(model)
    batch_norms = [path for path, module in model.named_modules() if is_batchnorm(module)]
    assert (len(batch_norms), sum(path in found for path in batch_norms), sum(map(is_norm, model.modules()))) == counts


@pytest.mark.parametrize("to", ["none", "group", "layer", "batch-renorm", "batchless", "l1"])
def test_convert_loads_the_checkpoint_trains_and_reverts(case, to, tmp_path):
    model, batch, _ = case
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    where = lambda path, layer: is_batchnorm(layer)  # noqa: E731
    other = normkit.convert(type(model)(model.config), to, where=where).eval()
    other.load_state_dict(type(model).from_pretrained(tmp_path).state_dict())
    normkit.convert(model, to, where=where)
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(normkit.revert(copy.deepcopy(model)), batch), expected)
    if to in ("batch-renorm", "batchless", "l1"):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    if to != "none":
        plain = type(model)(model.config).eval()
        plain.load_state_dict(normkit.revert(copy.deepcopy(other)).state_dict())
        assert torch.equal(logits(plain, batch), expected)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    handle = normkit.attach(model, optimizer) if to == "batchless" else None
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    if handle is not None:
        handle.remove()
    assert all(p.isfinite().all() for p in model.parameters())
    normkit.revert(model)
    assert model.state_dict().keys() == type(model)(model.config).state_dict().keys()


def test_fold_with_an_example_leaves_no_batch_norm_and_the_same_function(case):
    model, batch, (batch_norms, _, norms) = case
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = normkit.fold(model, example=batch)
    assert not any(is_batchnorm(module) for module in folded.modules())
    assert sum(map(is_norm, folded.modules())) == norms - batch_norms
    assert len(caught) == (norms > batch_norms)
    error = (logits(folded, batch) - logits(model, batch)).abs().max() / logits(model, batch).abs().max()
    assert error < 1e-5


def test_recalibrate_takes_the_batches_these_models_take(case):
    model, batch, _ = case
    norm = next(module for module in model.modules() if is_batchnorm(module))
    seen = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    normkit.recalibrate(model, [batch])
    torch.testing.assert_close(norm.running_mean, seen[0].transpose(0, 1).flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_norms_over_other_dimensions_are_refused_and_nothing_is_changed():
    config = transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_labels=3)
    model = transformers.ConvNextForImageClassification(config)
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"norm.*: ConvNext\w+ computes something else"):
        normkit.convert(model, "none")
    assert list(model.modules()) == before


def test_norms_with_an_activation_built_in_convert_and_come_back():
    config = transformers.BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2, num_labels=3)
    model, batch = transformers.BitForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    expected = logits(model, batch)
    normkit.convert(model, "none")
    assert not any(is_norm(module) for module in model.modules())
    assert torch.equal(logits(normkit.revert(model), batch), expected)
