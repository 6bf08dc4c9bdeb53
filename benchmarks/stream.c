/* What the memory of this machine allows: the streams of an optimizer step with next to no arithmetic.
 *
 * An optimizer reads a gradient once and updates the parameter and its states in place. These sweeps touch memory in
 * the same order and the same widths but only add integers, so that memory is the only possible bottleneck (and no
 * value becomes a denormal or a NaN, however many sweeps run). limit.py compiles this file for the machine it runs on
 * and calls stream_seconds() in turn with the measured variants.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_THREADS = 256 };

/* Numbered as Pattern.index in limit.py. */
enum pattern {
  READ,
  READ_1_INPLACE_2,
  READ_1_INPLACE_3,
  READ_1_INPLACE_2_HALF,
  READ_1_INPLACE_3_HALF,
  READ_HALF,
  READ_1_INPLACE_4,
  INPLACE_2,
  READ_1_INPLACE_1_WRITE_1,
  READ_1_WRITE_1
};

typedef struct {
  enum pattern pattern;
  void* const* streams; /* what is read, what is updated in place (the parameter first), what is only written */
  size_t begin, end;
  pthread_barrier_t* barrier;
  uint32_t sink; /* keeps the compiler from dropping a sweep that only reads */
} job;

static uint32_t read_1(const uint32_t* g, size_t begin, size_t end) {
  uint32_t sum = 0;
  for (size_t i = begin; i < end; i++) sum += g[i];
  return sum;
}

static uint32_t read_1_half(const uint16_t* g, size_t begin, size_t end) {
  uint16_t sum = 0;
  for (size_t i = begin; i < end; i++) sum = (uint16_t)(sum + g[i]);
  return sum;
}

static void inplace_2(const uint32_t* restrict g, uint32_t* restrict p, uint32_t* restrict m, size_t begin,
                      size_t end) {
  for (size_t i = begin; i < end; i++) {
    m[i] += g[i];
    p[i] += g[i];
  }
}

static void inplace_3(const uint32_t* restrict g, uint32_t* restrict p, uint32_t* restrict m, uint32_t* restrict v,
                      size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) {
    m[i] += g[i];
    v[i] += g[i];
    p[i] += g[i];
  }
}

static void inplace_4(const uint32_t* restrict g, uint32_t* restrict p, uint32_t* restrict m, uint32_t* restrict v,
                      uint32_t* restrict b, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) {
    m[i] += g[i];
    v[i] += g[i];
    b[i] += g[i];
    p[i] += g[i];
  }
}

static void inplace_2_half(const uint16_t* restrict g, uint16_t* restrict p, uint32_t* restrict m, size_t begin,
                           size_t end) {
  for (size_t i = begin; i < end; i++) {
    m[i] += g[i];
    p[i] = (uint16_t)(p[i] + g[i]);
  }
}

static void inplace_3_half(const uint16_t* restrict g, uint16_t* restrict p, uint32_t* restrict m, uint32_t* restrict v,
                           size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) {
    m[i] += g[i];
    v[i] += g[i];
    p[i] = (uint16_t)(p[i] + g[i]);
  }
}

static void inplace_2_alone(uint32_t* restrict p, uint32_t* restrict m, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) m[i] = p[i] = p[i] + m[i];
}

/* The two sweeps that overwrite a stream prefetch its cache lines, as the kernels do: hardware prefetchers follow
 * loads, not stores, and without this a copy takes 1.35 times as long. */
enum { LINE = 64 / sizeof(uint32_t) };

static void inplace_1_write_1(const uint32_t* restrict g, uint32_t* restrict p, uint32_t* restrict old, size_t begin,
                              size_t end) {
  size_t i = begin;
  for (; i + LINE <= end; i += LINE) {
    __builtin_prefetch(old + i, 1);
    for (size_t k = i; k < i + LINE; k++) {
      old[k] = p[k];
      p[k] += g[k];
    }
  }
  for (; i < end; i++) old[i] = p[i];
}

/* + 1 keeps the compiler from calling memcpy, which bypasses the caches; the kernels do not. */
static void write_1(const uint32_t* restrict old, uint32_t* restrict p, size_t begin, size_t end) {
  size_t i = begin;
  for (; i + LINE <= end; i += LINE) {
    __builtin_prefetch(p + i, 1);
    for (size_t k = i; k < i + LINE; k++) p[k] = old[k] + 1;
  }
  for (; i < end; i++) p[i] = old[i] + 1;
}

static void sweep(job* j) {
  void* const* s = j->streams;
  switch (j->pattern) {
    case READ: j->sink = read_1(s[0], j->begin, j->end); break;
    case READ_1_INPLACE_2: inplace_2(s[0], s[1], s[2], j->begin, j->end); break;
    case READ_1_INPLACE_3: inplace_3(s[0], s[1], s[2], s[3], j->begin, j->end); break;
    case READ_1_INPLACE_2_HALF: inplace_2_half(s[0], s[1], s[2], j->begin, j->end); break;
    case READ_1_INPLACE_3_HALF: inplace_3_half(s[0], s[1], s[2], s[3], j->begin, j->end); break;
    case READ_1_INPLACE_4: inplace_4(s[0], s[1], s[2], s[3], s[4], j->begin, j->end); break;
    case READ_HALF: j->sink = read_1_half(s[0], j->begin, j->end); break;
    case INPLACE_2: inplace_2_alone(s[0], s[1], j->begin, j->end); break;
    case READ_1_INPLACE_1_WRITE_1: inplace_1_write_1(s[0], s[1], s[2], j->begin, j->end); break;
    case READ_1_WRITE_1: write_1(s[0], s[1], j->begin, j->end); break;
  }
}

static void* worker(void* argument) {
  job* j = argument;
  pthread_barrier_wait(j->barrier); /* start together */
  sweep(j);
  pthread_barrier_wait(j->barrier); /* the last thread ends the measurement */
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one sweep, without thread creation; negative if the number of threads is out of range. */
double stream_seconds(int pattern, void* const* streams, size_t elements, int threads) {
  if (threads < 1 || threads > MAX_THREADS) return -1.0;
  pthread_t handles[MAX_THREADS];
  job jobs[MAX_THREADS];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, (unsigned)threads);

  /* Parts are multiples of 1024 elements: whole pages and full-width accesses for all threads except the last. */
  size_t part = (elements / (size_t)threads + 1023) / 1024 * 1024;
  for (int t = 0; t < threads; t++) {
    size_t begin = part * (size_t)t < elements ? part * (size_t)t : elements;
    size_t end = t + 1 < threads && begin + part < elements ? begin + part : elements;
    jobs[t] = (job){(enum pattern)pattern, streams, begin, end, &barrier, 0};
  }
  for (int t = 1; t < threads; t++) {
    if (pthread_create(&handles[t], NULL, worker, &jobs[t])) {
      perror("stream_seconds: pthread_create"); /* the threads already started wait for this one forever */
      abort();
    }
  }
  pthread_barrier_wait(&barrier);
  double start = now();
  sweep(&jobs[0]);
  pthread_barrier_wait(&barrier);
  double seconds = now() - start;

  for (int t = 1; t < threads; t++) pthread_join(handles[t], NULL);
  pthread_barrier_destroy(&barrier);
  return seconds;
}
