/* Draws images with a model, every thread its share, and writes them as one PGM or PPM picture, one below the other.
 *
 * cc -std=c99 -I runtime-native/c/include generate.c -L target/release -ldmd -lpthread -o generate
 * LD_LIBRARY_PATH=target/release ./generate model.onnx 7 16 2 >images.pgm
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "dmd.h"

/* What one thread draws: images first .. first + count of the seed. */
typedef struct {
    const dmd_generator *generator;
    uint32_t seed;
    uint64_t first;
    size_t count;
    uint8_t *pixels;
    size_t len;
    int failed;
} share;

static int failed(const char *what) {
    fprintf(stderr, "error: %s: %s\n", what, dmd_last_error());
    return 2;
}

static void *draw(void *argument) {
    share *s = argument;
    if (dmd_generate_pixels(s->generator, s->seed, s->first, s->count, DMD_CLASS_CYCLE, s->pixels, s->len) !=
        DMD_STATUS_OK) {
        s->failed = failed("cannot generate");
    }
    return NULL;
}

/* Draws all images; returns 0 if every thread did its share. */
static int draw_all(const dmd_generator *generator, uint32_t seed, size_t count, size_t threads, uint8_t *pixels,
                    size_t image) {
    share *shares = calloc(threads, sizeof *shares);
    pthread_t *ids = calloc(threads, sizeof *ids);
    size_t started = 0, i;
    int result = shares != NULL && ids != NULL ? 0 : 2;
    for (i = 0; result == 0 && i < threads; i++) {
        size_t from = count * i / threads, to = count * (i + 1) / threads;
        share s = {generator, seed, from, to - from, pixels + from * image, (to - from) * image, 0};
        shares[i] = s;
        if (pthread_create(&ids[i], NULL, draw, &shares[i]) != 0) {
            fprintf(stderr, "error: cannot start a thread\n");
            result = 2;
        } else {
            started++;
        }
    }
    for (i = 0; i < started; i++) {
        pthread_join(ids[i], NULL);
        if (shares[i].failed) {
            result = 2;
        }
    }
    free(shares);
    free(ids);
    return result;
}

int main(int argc, char **argv) {
    dmd_generator *generator = NULL;
    size_t shape[3], count, threads, image;
    uint8_t *pixels;
    uint32_t seed;
    int result;

    if (argc != 5) {
        fprintf(stderr, "usage: generate MODEL SEED COUNT THREADS >FILE.pgm\n");
        return 2;
    }
    seed = (uint32_t)strtoul(argv[2], NULL, 10);
    count = (size_t)strtoul(argv[3], NULL, 10);
    threads = (size_t)strtoul(argv[4], NULL, 10);
    if (threads == 0 || count < threads) {
        fprintf(stderr, "error: expected at least one image for every thread\n");
        return 2;
    }
    if (dmd_open(argv[1], "engine", 0, NULL, &generator) != DMD_STATUS_OK) {
        return failed("cannot open the model");
    }
    fprintf(stderr, "%s\n", dmd_info(generator));
    if (dmd_shape(generator, shape) != DMD_STATUS_OK || (shape[0] != 1 && shape[0] != 3)) {
        fprintf(stderr, "error: expected a model of grey or colour images\n");
        dmd_close(generator);
        return 2;
    }
    image = shape[0] * shape[1] * shape[2];
    pixels = calloc(count, image);
    result = pixels != NULL ? draw_all(generator, seed, count, threads, pixels, image) : 2;
    if (result == 0) {
        printf("P%c\n%zu %zu\n255\n", shape[0] == 1 ? '5' : '6', shape[2], shape[1] * count);
        if (fwrite(pixels, image, count, stdout) != count || fflush(stdout) != 0) {
            perror("error: cannot write");
            result = 2;
        }
    }
    free(pixels);
    dmd_close(generator);
    return result;
}
