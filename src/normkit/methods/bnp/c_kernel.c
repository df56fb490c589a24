// The step of batch normalization preconditioning (arXiv 2108.01110): running statistics of all layers, and their gradients.
//
// A gradient is read with its weight once for its lengths, and once more, from the cache, to be written.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define ALONE (1 << 15)       // weights of a layer up to which one thread is faster than several
#define SMALLEST_SPREAD 0.1   // as in preconditioning.py

// What `RowStatistics.advance` computes once the rows are summed over ranks.
// first: of each layer its first feature, then their number. flat: rows of each layer, output positions of each layer, sum
// and sum of squares of each feature. mean, variance, steps: running, in place. used_mean, guarded, divisor, known: what preconditions the step.
void advance(int64_t layers, const int64_t *first, const double *fan_in, const double *flat, double decay, int64_t pooled,
             double eps_relative, double eps, double *mean, double *variance, double *steps, double *used_mean,
             double *guarded, double *divisor, double *known) {
  const double *rows = flat, *positions = flat + layers;
  const double *sums = flat + 2 * layers;
  for (int64_t l = 0; l < layers; l++) {
    double all = 0, largest = 0;
    for (int64_t f = first[l]; f < first[l + 1]; f++) all += sums[2 * f + 1];
    int usable = rows[l] > 0 && all < INFINITY;  // a layer's sum of squares is finite only if each of its rows is
    steps[l] += usable;
    double share = pooled ? fmax(1 / fmax(steps[l], 1), 1 - decay) : 1 - decay;
    for (int64_t f = first[l]; f < first[l + 1]; f++) {
      if (usable) {
        double batch_mean = sums[2 * f] / rows[l], delta = batch_mean - mean[f], moved = share * delta;
        double batch_variance = fmax(sums[2 * f + 1] / rows[l] - batch_mean * batch_mean, 0);
        double within = pooled ? variance[f] + moved * delta : variance[f];
        mean[f] += moved;
        variance[f] = within + share * (batch_variance - within);
      }
      largest = fmax(largest, variance[f]);
    }
    known[l] = steps[l] > 0 && rows[l] > 0;
    divisor[l] = positions[l] == 0 ? 1 : fmax(fan_in[l] / fmax(positions[l], 1), 1);
    for (int64_t f = first[l]; f < first[l + 1]; f++) {
      used_mean[f] = known[l] ? mean[f] : 0;
      guarded[f] = known[l] ? variance[f] + eps_relative * largest + eps : 1;
    }
  }
}

// Columns of the rows of one group: mean of the input, its guarded deviation, the reciprocals of deviation and variance, and what gives
// the gradient that centring implies for the bias of a layer without one.
typedef struct {
  REAL *mean, *sigma, *scale, *square, *implied;
} Columns;

static void expand(const double *mean, const double *guarded, int64_t ins, int64_t taps, int64_t taps_first, Columns c) {
  double length = 1;
  for (int64_t i = 0; i < ins; i++) {
    double s = sqrt(guarded[i]), v = mean[i] / s;
    length += taps * v * v;
    for (int64_t t = 0; t < taps; t++) {
      int64_t column = taps_first ? t * ins + i : i * taps + t;
      c.mean[column] = mean[i];
      c.sigma[column] = s;
      c.scale[column] = 1 / s;
      c.square[column] = 1 / guarded[i];
      c.implied[column] = v / s;
    }
  }
  for (int64_t j = 0; j < ins * taps; j++) c.implied[j] /= length;
}

// One unit: lengths of gradient and weight in terms of z, bound, and the gradient through z and back; see preconditioning.py.
static void unit(REAL *g, const REAL *w, REAL *bias, int64_t columns, Columns c, int64_t centred, double factor, double reach,
                 double max_change) {
  REAL b = 0, change = 0, spread = 0, along = 0;
  if (bias) {
    b = *bias;
  } else if (centred) {
#pragma omp simd reduction(+ : b)
    for (int64_t j = 0; j < columns; j++) b += g[j] * c.implied[j];
  }
  if (max_change > 0 && reach > 0) {
#pragma omp simd reduction(+ : change, spread)
    for (int64_t j = 0; j < columns; j++) {
      REAL z = (g[j] - b * c.mean[j]) * c.scale[j], weight = w[j] * c.sigma[j];
      change += z * z;
      spread += weight * weight;
    }
    double moved = sqrt((double)change + (double)b * b) * factor * reach;
    factor *= fmin(max_change * fmax(sqrt(spread), SMALLEST_SPREAD) / fmax(moved, 1e-15), 1);
  }
  REAL f = factor;
#pragma omp simd reduction(+ : along)
  for (int64_t j = 0; j < columns; j++) {
    REAL back = (g[j] - b * c.mean[j]) * c.square[j] * f;
    g[j] = back;
    along += back * c.mean[j];
  }
  if (bias) *bias = b * f - along;
}

// What `Transform` computes for the layers whose weights lie row by row in memory.
// shapes: of each layer its place, groups, units and input channels of a group, taps, whether the channels of a tap lie side by
// side, whether a layer without bias is centred. addresses: gradient, weight, gradient of the bias or NULL. reach: how far the
// optimizer carries each along a lasting gradient, 0 where nothing bounds it.
void transform(int64_t layers, const int64_t *shapes, void **addresses, const double *reach, const int64_t *first,
               const double *mean, const double *guarded, const double *divisor, const double *known, double max_change,
               int64_t threads) {
  for (int64_t l = 0; l < layers; l++, shapes += 7, addresses += 3) {
    int64_t place = shapes[0], groups = shapes[1], units = shapes[2], ins = shapes[3], taps = shapes[4];
    int64_t columns = ins * taps;
    REAL *memory = malloc(5 * columns * sizeof(REAL)), *g = addresses[0], *w = addresses[1], *bias = addresses[2];
    Columns c = {memory, memory + columns, memory + 2 * columns, memory + 3 * columns, memory + 4 * columns};
    for (int64_t group = 0; group < groups; group++) {
      int64_t feature = first[place] + group * ins;
      expand(mean + feature, guarded + feature, ins, taps, shapes[5], c);
#pragma omp parallel for if (threads > 1 && units * columns > ALONE) num_threads(threads)
      for (int64_t u = group * units; u < (group + 1) * units; u++)
        unit(g + u * columns, w + u * columns, bias ? bias + u : NULL, columns, c, shapes[6], 1 / divisor[place],
             known[place] * reach[l], max_change);
    }
    free(memory);
  }
}
