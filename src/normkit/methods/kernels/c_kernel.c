// Sum and sum of squares of every feature of a layer's input, in one pass over memory, added up in double precision.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STRIP 16          // features side by side that are summed together: they stay in registers
#define ALONE (1 << 16)   // elements up to which one thread is faster than several

static void sum_line(const REAL *x, double pivot, const double *taps, int64_t length, double *sums) {
  double t = 0, s = 0;
  if (taps) {
#pragma omp simd reduction(+ : t, s)
    for (int64_t i = 0; i < length; i++) {
      double h = x[i] - pivot, weighted = taps[i] * h;
      t += weighted;
      s += weighted * h;
    }
  } else {
#pragma omp simd reduction(+ : t, s)
    for (int64_t i = 0; i < length; i++) {
      double h = x[i] - pivot;
      t += h;
      s += h * h;
    }
  }
  sums[0] += t;
  sums[1] += s;
}

// Rows from..to of `features` numbers each; the taps of a row are those of its position.
static void sum_rows(const REAL *x, const REAL *pivot, const double *taps, int64_t from, int64_t to, int64_t features,
                     int64_t positions, double *sums) {
  int64_t first = 0;
  for (; first + STRIP <= features; first += STRIP) {
    double t[STRIP] = {0}, s[STRIP] = {0}, zero[STRIP];
    for (int i = 0; i < STRIP; i++) zero[i] = pivot ? pivot[first + i] : 0;
    for (int64_t r = from, p = from % positions; r < to; r++, p = p + 1 == positions ? 0 : p + 1) {
      const REAL *row = x + r * features + first;
      double tap = taps ? taps[p] : 1;
#pragma omp simd
      for (int i = 0; i < STRIP; i++) {
        double h = row[i] - zero[i], weighted = tap * h;
        t[i] += weighted;
        s[i] += weighted * h;
      }
    }
    for (int i = 0; i < STRIP; i++) sums[2 * (first + i)] += t[i], sums[2 * (first + i) + 1] += s[i];
  }
  for (int64_t r = from, p = from % positions; first < features && r < to; r++, p = p + 1 == positions ? 0 : p + 1) {
    double tap = taps ? taps[p] : 1;
    for (int64_t f = first; f < features; f++) {
      double h = x[r * features + f] - (pivot ? pivot[f] : 0), weighted = tap * h;
      sums[2 * f] += weighted;
      sums[2 * f + 1] += weighted * h;
    }
  }
}

// x: images of `features` maps with `positions` each, or, with last != 0, of `positions` rows of `features`.
// taps: how often each position counts, NULL where each counts once. sums: zeros, two for each feature. pivot: what is subtracted from every
// x, or NULL.
static void about(const REAL *x, const REAL *pivot, const double *taps, int64_t images, int64_t features,
                  int64_t positions, int64_t last, int64_t threads, double *sums) {
  int64_t rows = images * positions;
  int several = threads > 1 && rows * features > ALONE;
  if (!last) {
#pragma omp parallel for if (several) num_threads(threads)
    for (int64_t f = 0; f < features; f++)
      for (int64_t n = 0; n < images; n++)
        sum_line(x + (n * features + f) * positions, pivot ? pivot[f] : 0, taps, positions, sums + 2 * f);
    return;
  }
  double *parts = several ? calloc(threads * 2 * features, sizeof(double)) : NULL;
  if (!parts) {
    sum_rows(x, pivot, taps, 0, rows, features, positions, sums);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    double *own = parts + part * 2 * features;
    sum_rows(x, pivot, taps, part * rows / threads, (part + 1) * rows / threads, features, positions, own);
  }
  for (int64_t part = 0; part < threads; part++)
    for (int64_t f = 0; f < 2 * features; f++) sums[f] += parts[part * 2 * features + f];
  free(parts);
}

void sums(const REAL *x, const double *taps, int64_t images, int64_t features, int64_t positions, int64_t last,
          int64_t threads, double *sums) {
  memset(sums, 0, 2 * features * sizeof(double));
  about(x, NULL, taps, images, features, positions, last, threads, sums);
}

// Mean and sum of squared deviations of every feature; sums about a pivot near the mean lose no digits.
// pivot: one number for each feature; other arguments as for `sums`.
void moments(const REAL *x, const REAL *pivot, int64_t images, int64_t features, int64_t positions, int64_t last,
             int64_t threads, REAL *means, REAL *squares) {
  double *found = calloc(2 * features, sizeof(double)), count = (double)images * positions;
  about(x, pivot, NULL, images, features, positions, last, threads, found);
  for (int64_t f = 0; f < features; f++) {
    double mean = found[2 * f] / count, square = found[2 * f + 1] - mean * found[2 * f];
    means[f] = pivot[f] + mean;
    squares[f] = square < 0 ? 0 : square;
  }
  free(found);
}

// `sums` of a layer's input x and `moments` of its output y.
void sums_and_moments(const REAL *x, int64_t images, int64_t features, int64_t positions, int64_t last, double *found,
                      const REAL *y, const REAL *pivot, int64_t y_images, int64_t y_features, int64_t y_positions,
                      int64_t y_last, REAL *means, REAL *squares, int64_t threads) {
  sums(x, NULL, images, features, positions, last, threads, found);
  moments(y, pivot, y_images, y_features, y_positions, y_last, threads, means, squares);
}
