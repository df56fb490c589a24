// The steps of SGD-G and Adam-G (arXiv 1709.09603) for the filters of all weights, as in the Triton kernel beside this file.
//
// A filter is read from memory once and then again from the cache, three times in all: for its length and its product with the
// gradient, for the lengths of the tangent gradient and the momentum, and for the update.

#include <math.h>
#include <stdint.h>

#define ALONE (1 << 15)  // elements of a weight up to which one thread is faster than several

typedef struct {
  double lr, momentum, max_norm, beta2, eps;
  int64_t adam;
} Rule;

static void filter(REAL *y, const REAL *g, REAL *tau, REAL *v, int64_t n, Rule rule, double correction) {
  REAL yy = 0, yg = 0, hh = 0, th = 0, tt = 0;
#pragma omp simd reduction(+ : yy, yg)
  for (int64_t i = 0; i < n; i++) {
    yy += y[i] * y[i];
    yg += y[i] * g[i];
  }
  REAL a = yg / yy;
#pragma omp simd reduction(+ : hh, th, tt)
  for (int64_t i = 0; i < n; i++) {
    REAL h = g[i] - a * y[i];
    hh += h * h;
    th += tau[i] * h;
    tt += tau[i] * tau[i];
  }
  // m = momentum tau + push h, d = scale m
  double clip = isinf(rule.max_norm) ? 1 : rule.max_norm / fmax(sqrt(hh), rule.max_norm), push, scale = 1;
  if (!isfinite(hh)) clip = hh = th = 0;  // a length that overflows is clipped to zero
  if (rule.adam) {
    push = (1 - rule.momentum) * clip;
    *v = rule.beta2 * *v + (1 - rule.beta2) * clip * clip * hh;
    scale = -rule.lr * correction / sqrt(*v + rule.eps);
  } else {
    push = -rule.lr * clip;
  }
  double mm = fmax(rule.momentum * rule.momentum * tt + 2 * rule.momentum * push * th + push * push * hh, 0);
  double t = fabs(scale) * sqrt(mm), sinc = t > 1e-4 ? sin(t) / t : 1 - t * t / 6, shrink = 1 / sqrt(yy);
  // exp_y(d) = y cos t + d sinc t and pt_y(m; d) = m cos t - y scale |m|^2 sinc t
  REAL keep = rule.momentum, add = push, along = cos(t) * shrink, across = scale * sinc, cosine = cos(t);
  REAL back = scale * mm * sinc * shrink;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    REAL m = keep * tau[i] + add * (g[i] - a * y[i]), old = y[i];
    y[i] = along * old + across * m;
    tau[i] = cosine * m - back * old;
  }
}

// shapes: of each weight its filters and the elements of one. addresses: weight, gradient, momentum, second moment or NULL.
// corrections: of the learning rate, for each weight.
void advance(int64_t weights, const int64_t *shapes, void **addresses, const double *corrections, double lr, double momentum,
             double max_norm, double beta2, double eps, int64_t adam, int64_t threads) {
  Rule rule = {lr, momentum, max_norm, beta2, eps, adam};
  for (int64_t w = 0; w < weights; w++) {
    int64_t filters = shapes[2 * w], n = shapes[2 * w + 1];
    REAL *y = addresses[4 * w], *g = addresses[4 * w + 1], *tau = addresses[4 * w + 2], *v = addresses[4 * w + 3];
#pragma omp parallel for if (threads > 1 && filters * n > ALONE) num_threads(threads)
    for (int64_t f = 0; f < filters; f++)
      filter(y + f * n, g + f * n, tau + f * n, adam ? v + f : (REAL *)0, n, rule, corrections[w]);
  }
}
