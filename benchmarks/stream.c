/* What the memory of this machine allows: the streams of a pass over memory with next to no arithmetic.
 *
 * A pass reads some streams, updates some in place and overwrites some. The sweep below touches the same bytes but only
 * adds integers, so that memory is the only possible bottleneck. Which order of accesses is fastest depends on the
 * machine, so the caller chooses: how many elements of one stream are touched before the next stream's turn, and
 * whether what is overwritten goes around the caches. limit.py compiles this file for the machine it runs on.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { MAX_THREADS = 256, LINE = 64 };

/* Bytes by which loads run ahead. Hardware prefetchers follow neither stores nor more than some streams, and stop at
 * the end of a page: without this a copy takes 1.35 times as long, and a sweep over four streams 1.05 times. */
enum { AHEAD = 1024 };

/* Numbered as in limit.py. */
enum access { READ, UPDATE, OVERWRITE };

/* The same layout as limit.py's Stream. */
typedef struct {
  char* data;   /* aligned to a cache line */
  size_t width; /* bytes per element */
  int access;
} stream;

/* The same layout as limit.py's Pass. */
typedef struct {
  const stream* streams;
  int n_streams;
} pass;

typedef struct {
  const pass* passes;
  int n_passes;
  size_t begin, end, block; /* elements: multiples of LINE */
  int around;               /* whether what is overwritten goes around the caches */
  int threads;
  int* arrived; /* how often a thread has come to where it waits for the others */
  double seconds, on_core;
  uint64_t sink; /* keeps the compiler from dropping a sweep that only reads */
} job;

static uint64_t read_lines(const uint64_t* restrict at, size_t words) {
  uint64_t sum = 0;
  for (size_t i = 0; i < words; i++) sum += at[i];
  return sum;
}

static void update_lines(uint64_t* restrict at, size_t words) {
  for (size_t i = 0; i < words; i++) at[i] += 1;
}

static void overwrite_lines(uint64_t* restrict at, size_t words) {
  for (size_t i = 0; i < words; i++) at[i] = i;
}

static void overwrite_around(uint64_t* restrict at, size_t words) {
#ifdef __SSE2__
  const __m128i value = _mm_set1_epi32(1);
  for (size_t i = 0; i < words; i += 2) _mm_stream_si128((__m128i*)(at + i), value);
#else
  overwrite_lines(at, words);
#endif
}

static void prefetch(const char* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at + AHEAD + i);
}

static void prefetch_to_write(const char* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at + AHEAD + i, 1);
}

static void sweep_lines(job* j, const stream* s, size_t i, size_t elements) {
  char* const at = s->data + i * s->width;
  const size_t bytes = elements * s->width, words = bytes / sizeof(uint64_t);
  switch ((enum access)s->access) {
    case READ:
      prefetch(at, bytes);
      j->sink += read_lines((uint64_t*)at, words);
      break;
    case UPDATE:
      prefetch_to_write(at, bytes);
      update_lines((uint64_t*)at, words);
      break;
    case OVERWRITE:
      if (j->around) {
        overwrite_around((uint64_t*)at, words);
        break;
      }
      prefetch_to_write(at, bytes);
      overwrite_lines((uint64_t*)at, words);
      break;
  }
}

static void sweep(job* j, const pass* p) {
  for (size_t i = j->begin; i < j->end; i += j->block) {
    const size_t elements = i + j->block < j->end ? j->block : j->end - i;
    for (int s = 0; s < p->n_streams; s++) sweep_lines(j, &p->streams[s], i, elements);
  }
#ifdef __SSE2__
  _mm_sfence(); /* what goes around the caches has arrived */
#endif
}

/* Waits until all threads have arrived as often, without sleeping: waking up would take a part of a short sweep. */
static void meet(job* j, int times) {
  __atomic_add_fetch(j->arrived, 1, __ATOMIC_ACQ_REL);
  for (unsigned turns = 1; __atomic_load_n(j->arrived, __ATOMIC_ACQUIRE) < times * j->threads; turns++)
    if (turns % 100000 == 0) sched_yield(); /* another thread may need this core to arrive */
}

static double now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void* worker(void* argument) {
  job* j = argument;
  meet(j, 1);
  const double start = now(CLOCK_MONOTONIC), start_on_core = now(CLOCK_THREAD_CPUTIME_ID);
  for (int p = 0; p < j->n_passes; p++) {
    sweep(j, &j->passes[p]);
    meet(j, p + 2); /* the last thread ends the pass */
  }
  j->seconds = now(CLOCK_MONOTONIC) - start;
  j->on_core = now(CLOCK_THREAD_CPUTIME_ID) - start_on_core;
  return NULL;
}

/* Seconds of the passes, without thread creation; negative if the number of threads is out of range. Each thread has a
 * part of its own, as in onepass's engine. elements and block are multiples of LINE. *waited: the seconds for which the
 * threads did not have a core; as they never sleep, other processes had it. */
double stream_seconds(const pass* passes, int n_passes, size_t elements, size_t block, int around, int threads,
                      double* waited) {
  if (threads < 1 || threads > MAX_THREADS) return -1.0;
  pthread_t handles[MAX_THREADS];
  job jobs[MAX_THREADS];
  int arrived = 0;

  const size_t part = (elements / (size_t)threads + LINE - 1) / LINE * LINE;
  for (int t = 0; t < threads; t++) {
    const size_t begin = part * (size_t)t < elements ? part * (size_t)t : elements;
    const size_t end = t + 1 < threads && begin + part < elements ? begin + part : elements;
    jobs[t] = (job){passes, n_passes, begin, end, block, around, threads, &arrived, 0.0, 0.0, 0};
  }
  for (int t = 1; t < threads; t++) {
    if (pthread_create(&handles[t], NULL, worker, &jobs[t])) {
      perror("stream_seconds: pthread_create"); /* the threads already started wait for this one forever */
      abort();
    }
  }
  worker(&jobs[0]);
  *waited = jobs[0].seconds - jobs[0].on_core;
  for (int t = 1; t < threads; t++) {
    pthread_join(handles[t], NULL);
    *waited += jobs[t].seconds - jobs[t].on_core;
  }
  return jobs[0].seconds;
}
