// The step of batchless normalization (arXiv 2212.14729) for all layers: projection of the weights' gradients, likelihood's fit.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define ALONE (1 << 15)  // weights of a layer up to which one thread is faster than several

static double finite_or_zero(double x) { return isfinite(x) ? x : 0; }

// One unit of a layer. mean: of its inputs. square: what a share along the mean is divided by.
// lengths: of gradient and weight, squared.
static void project_unit(REAL *restrict gradient, const REAL *restrict weight, const REAL *restrict mean, int64_t columns,
                         double square, REAL *lengths) {
  REAL gm = 0, gw = 0, mw = 0, ww = 0, gg = 0;
#pragma omp simd reduction(+ : gm, gw, mw, ww)
  for (int64_t j = 0; j < columns; j++) {
    gm += gradient[j] * mean[j];
    gw += gradient[j] * weight[j];
    mw += mean[j] * weight[j];
    ww += weight[j] * weight[j];
  }
  REAL a = gm / square;
  REAL b = ww > 0 ? (gw - a * mw) / ww : 0;  // along the weight, of the gradient without its part along the mean
#pragma omp simd reduction(+ : gg)
  for (int64_t j = 0; j < columns; j++) {
    gradient[j] -= a * mean[j] + b * weight[j];
    gg += gradient[j] * gradient[j];
  }
  lengths[0] = gg;
  lengths[1] = ww;
}

// What `projected_weight_gradient` computes, for all layers.
// shapes: of each layer groups, units and input channels of a group, taps, whether the channels of a tap lie side by side.
// addresses: gradient and weight of each. rows: of each layer. all_sums: of each layer sum and sum of squares of its inputs.
// ratios: of each layer the length of the projected gradient relative to the weight's, 0 where that is 0.
void project(int64_t layers, const int64_t *shapes, void **addresses, const double *rows, const double **all_sums,
             double *ratios, int64_t threads) {
  for (int64_t l = 0; l < layers; l++, shapes += 5, addresses += 2) {
    int64_t groups = shapes[0], units = shapes[1], ins = shapes[2], taps = shapes[3], columns = ins * taps;
    REAL *mean = malloc((columns + 2 * units) * sizeof(REAL)), *lengths = mean + columns;
    REAL *g = addresses[0], *w = addresses[1];
    const double *sums = all_sums[l];
    double count = rows[l] > 1 ? rows[l] : 1, length_g = 0, length_w = 0;
    for (int64_t group = 0; group < groups; group++, sums += 2 * ins) {
      double length = 0, along = 0;
      for (int64_t i = 0; i < ins; i++) {
        double m = sums[2 * i] / count, variance = sums[2 * i + 1] / count - m * m;
        m = finite_or_zero(m);
        length += m * m;
        along += m * m * finite_or_zero(variance < 0 ? 0 : variance);
        for (int64_t t = 0; t < taps; t++) mean[shapes[4] ? t * ins + i : i * taps + t] = m;
      }
      double square = fmax(along / fmax(length, DBL_MIN) + taps * length, DBL_MIN);
      if (threads > 1 && units * columns > ALONE) {
#pragma omp parallel for num_threads(threads)
        for (int64_t u = 0; u < units; u++)
          project_unit(g + u * columns, w + u * columns, mean, columns, square, lengths + 2 * u);
      } else {  // a team of one costs as much as a small layer
        for (int64_t u = 0; u < units; u++)
          project_unit(g + u * columns, w + u * columns, mean, columns, square, lengths + 2 * u);
      }
      g += units * columns, w += units * columns;
      for (int64_t u = 0; u < units; u++) length_g += lengths[2 * u], length_w += lengths[2 * u + 1];
    }
    ratios[l] = length_w > 0 ? sqrt(length_g / length_w) : 0;
    free(mean);
  }
}

// What `Fit` computes, for all layers: of each mean of n^2 over its features, and, for a rate above 0, the step of mu and sigma.
// addresses: of each layer running mean, running variance, then count, mean and sum of squared deviations of the rows.
// instances: of each layer. ratios: of each layer, before the step.
void fit(int64_t layers, const int64_t *features, void **addresses, const double *instances, double eps, double rate,
         double damping, double *ratios) {
  int valid = 1;  // rows with anything that is not finite in them, in any of the layers, count for nothing
  for (int64_t l = 0; l < layers; l++) {
    REAL **a = (REAL **)addresses + 5 * l, *mean = a[0], *variance = a[1], *seen = a[3], *m2 = a[4];
    double count = *a[2], total = 0, about = 0;
    for (int64_t f = 0; f < features[l]; f++) {
      double deviation = seen[f] - mean[f], square = m2[f] / fmax(count, 1) + deviation * deviation;
      about += square;
      total += square / (variance[f] + eps);
    }
    valid &= isfinite(about);
    ratios[l] = count > 0 ? total / features[l] : 1;
  }
  for (int64_t l = 0; l < layers; l++) {
    REAL **a = (REAL **)addresses + 5 * l, *mean = a[0], *variance = a[1], *seen = a[3], *m2 = a[4];
    double count = *a[2], eta = rate * instances[l] / (instances[l] + damping);
    if (!valid) ratios[l] = 1;
    for (int64_t f = 0; valid && count > 0 && rate > 0 && f < features[l]; f++) {
      double deviation = seen[f] - mean[f], square = m2[f] / fmax(count, 1) + deviation * deviation;
      mean[f] += eta * deviation;
      variance[f] += eta * (square - variance[f]);
    }
  }
}

// Forward and backward pass of a layer, each in one pass over memory.
// layout: samples, channels, positions, and whether the channels of a position lie side by side.

#define STRIP 16         // channels side by side that are summed together: they stay in registers
#define SMALL (1 << 16)  // elements of an activation up to which one thread is faster than several

typedef struct {
  int64_t samples, channels, positions, last;
} Layout;

// Work on the rows from..to of some channels; sums: two for each channel.
typedef void Rows(const void *task, Layout layout, int64_t from, int64_t to, double *sums);
typedef void Line(const void *task, int64_t channel, int64_t start, int64_t length, double *sums);

static void walk(const void *task, Layout l, Line line, Rows rows, int64_t threads, double *sums) {
  int64_t count = l.samples * l.positions;
  int several = threads > 1 && count * l.channels > SMALL;
  if (!l.last) {
#pragma omp parallel for if (several) num_threads(threads)
    for (int64_t c = 0; c < l.channels; c++)
      for (int64_t n = 0; n < l.samples; n++)
        line(task, c, (n * l.channels + c) * l.positions, l.positions, sums + 2 * c);
    return;
  }
  double *parts = several ? calloc(threads * 2 * l.channels, sizeof(double)) : NULL;
  if (!parts) {
    rows(task, l, 0, count, sums);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < threads; part++)
    rows(task, l, part * count / threads, (part + 1) * count / threads, parts + part * 2 * l.channels);
  for (int64_t part = 0; part < threads; part++)
    for (int64_t i = 0; i < 2 * l.channels; i++) sums[i] += parts[part * 2 * l.channels + i];
  free(parts);
}

typedef struct {
  const REAL *x, *dy, *mean, *variance, *gamma, *beta;
  REAL *out;
  double eps;
} Pass;

static void forward_line(const void *task, int64_t c, int64_t start, int64_t length, double *sums) {
  const Pass *p = task;
  const REAL *x = p->x + start;
  REAL *y = p->out + start, mean = p->mean[c], scale = 1 / sqrt(p->variance[c] + p->eps), shift = 0;
  if (p->gamma) scale *= p->gamma[c], shift = p->beta[c];
  double total = 0, square = 0;
#pragma omp simd reduction(+ : total, square)
  for (int64_t i = 0; i < length; i++) {
    REAL h = x[i] - mean;
    y[i] = h * scale + shift;
    total += h;
    square += (double)h * h;
  }
  sums[0] += total;
  sums[1] += square;
}

static void forward_rows(const void *task, Layout l, int64_t from, int64_t to, double *sums) {
  const Pass *p = task;
  for (int64_t first = 0; first < l.channels; first += STRIP) {
    int width = l.channels - first < STRIP ? l.channels - first : STRIP;
    REAL mean[STRIP] = {0}, scale[STRIP] = {0}, shift[STRIP] = {0};
    double total[STRIP] = {0}, square[STRIP] = {0};
    for (int i = 0; i < width; i++) {
      mean[i] = p->mean[first + i];
      scale[i] = (p->gamma ? p->gamma[first + i] : 1) / sqrt(p->variance[first + i] + p->eps);
      shift[i] = p->gamma ? p->beta[first + i] : 0;
    }
    const REAL *x = p->x + from * l.channels + first;
    REAL *y = p->out + from * l.channels + first;
    if (width == STRIP)
      for (int64_t r = from; r < to; r++, x += l.channels, y += l.channels) {
#pragma omp simd
        for (int i = 0; i < STRIP; i++) {
          REAL h = x[i] - mean[i];
          y[i] = h * scale[i] + shift[i];
          total[i] += h;
          square[i] += (double)h * h;
        }
      }
    else
      for (int64_t r = from; r < to; r++, x += l.channels, y += l.channels)
        for (int i = 0; i < width; i++) {
          REAL h = x[i] - mean[i];
          y[i] = h * scale[i] + shift[i];
          total[i] += h;
          square[i] += (double)h * h;
        }
    for (int i = 0; i < width; i++) sums[2 * (first + i)] += total[i], sums[2 * (first + i) + 1] += square[i];
  }
}

// y = (x - mu) / sigma * gamma + beta. moments: means of the channels, then sums of squared deviations. gamma, beta: or NULL.
void forward(const REAL *x, REAL *y, const REAL *mean, const REAL *variance, const REAL *gamma, const REAL *beta, double eps,
             int64_t samples, int64_t channels, int64_t positions, int64_t last, int64_t threads, REAL *moments) {
  Layout layout = {samples, channels, positions, last};
  Pass pass = {x, NULL, mean, variance, gamma, beta, y, eps};
  double *sums = calloc(2 * channels, sizeof(double)), count = (double)samples * positions;
  walk(&pass, layout, forward_line, forward_rows, threads, sums);
  for (int64_t c = 0; c < channels; c++) {
    double deviation = sums[2 * c] / count, square = sums[2 * c + 1] - deviation * sums[2 * c];
    moments[c] = mean[c] + deviation;
    moments[channels + c] = square < 0 ? 0 : square;
  }
  free(sums);
}

static void backward_line(const void *task, int64_t c, int64_t start, int64_t length, double *sums) {
  const Pass *p = task;
  const REAL *x = p->x + start, *dy = p->dy + start;
  REAL *dx = p->out ? p->out + start : NULL, mean = p->mean[c], slope = p->gamma[c] / sqrt(p->variance[c] + p->eps);
  double shift = 0, scale = 0;
  if (dx) {
#pragma omp simd reduction(+ : shift, scale)
    for (int64_t i = 0; i < length; i++) {
      REAL d = dy[i];
      shift += d;
      scale += (double)d * (x[i] - mean);
      dx[i] = d * slope;
    }
  } else {
#pragma omp simd reduction(+ : shift, scale)
    for (int64_t i = 0; i < length; i++) {
      shift += dy[i];
      scale += (double)dy[i] * (x[i] - mean);
    }
  }
  sums[0] += scale;
  sums[1] += shift;
}

static void backward_rows(const void *task, Layout l, int64_t from, int64_t to, double *sums) {
  const Pass *p = task;
  for (int64_t first = 0; first < l.channels; first += STRIP) {
    int width = l.channels - first < STRIP ? l.channels - first : STRIP;
    REAL mean[STRIP] = {0}, slope[STRIP] = {0};
    double scale[STRIP] = {0}, shift[STRIP] = {0};
    for (int i = 0; i < width; i++) {
      mean[i] = p->mean[first + i];
      slope[i] = p->gamma[first + i] / sqrt(p->variance[first + i] + p->eps);
    }
    const REAL *x = p->x + from * l.channels + first, *dy = p->dy + from * l.channels + first;
    REAL *dx = p->out ? p->out + from * l.channels + first : NULL;
    if (width == STRIP && dx)
      for (int64_t r = from; r < to; r++, x += l.channels, dy += l.channels, dx += l.channels) {
#pragma omp simd
        for (int i = 0; i < STRIP; i++) {
          REAL d = dy[i];
          shift[i] += d;
          scale[i] += (double)d * (x[i] - mean[i]);
          dx[i] = d * slope[i];
        }
      }
    else
      for (int64_t r = from; r < to; r++, x += l.channels, dy += l.channels) {
        for (int i = 0; i < width; i++) {
          REAL d = dy[i];
          shift[i] += d;
          scale[i] += (double)d * (x[i] - mean[i]);
          if (dx) dx[i] = d * slope[i];
        }
        if (dx) dx += l.channels;
      }
    for (int i = 0; i < width; i++) sums[2 * (first + i)] += scale[i], sums[2 * (first + i) + 1] += shift[i];
  }
}

// dx = gamma dy / sigma, unless dx is NULL. gradients: those of gamma, then those of beta.
void backward(const REAL *dy, const REAL *x, REAL *dx, const REAL *mean, const REAL *variance, const REAL *gamma, double eps,
              int64_t samples, int64_t channels, int64_t positions, int64_t last, int64_t threads, REAL *gradients) {
  Layout layout = {samples, channels, positions, last};
  Pass pass = {x, dy, mean, variance, gamma, NULL, dx, eps};
  double *sums = calloc(2 * channels, sizeof(double));
  walk(&pass, layout, backward_line, backward_rows, threads, sums);
  for (int64_t c = 0; c < channels; c++) {
    gradients[c] = sums[2 * c] / sqrt(variance[c] + eps);
    gradients[channels + c] = sums[2 * c + 1];
  }
  free(sums);
}
