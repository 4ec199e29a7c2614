/* One-step generators from ONNX files, for C. Written by cbindgen from runtime-native/c/src/lib.rs.
 *
 * Every function may be called from any thread, and a generator may be used by several at once; only dmd_close must be
 * the last to use it. Text is UTF-8. A function that fails says why in dmd_last_error of the same thread.
 */

#ifndef DMD_H
#define DMD_H

#include <stddef.h>
#include <stdint.h>

/*
 `class_id` for images of every class in turn: image `k` has class `k` modulo their number. Also for models without.
 */
#define DMD_CLASS_CYCLE -1

/*
 What a function returns.
 */
typedef enum {
  /*
   It did what it says.
   */
  DMD_STATUS_OK = 0,
  /*
   A pointer is null.
   */
  DMD_STATUS_NULL_POINTER = 1,
  /*
   A text is not UTF-8, or names nothing.
   */
  DMD_STATUS_INVALID_TEXT = 2,
  /*
   A buffer is too small for what was asked.
   */
  DMD_STATUS_BUFFER_TOO_SMALL = 3,
  /*
   The file cannot be read, or is no model.
   */
  DMD_STATUS_INVALID_MODEL = 4,
  /*
   The model does not have what was asked for: a class, a number of images.
   */
  DMD_STATUS_INVALID_REQUEST = 5,
  /*
   The provider asked for cannot be had here.
   */
  DMD_STATUS_PROVIDER_UNAVAILABLE = 6,
  /*
   The engine failed.
   */
  DMD_STATUS_ENGINE_FAILED = 7,
  /*
   A bug of this library.
   */
  DMD_STATUS_INTERNAL_ERROR = 8,
} dmd_status;

/*
 A model, ready to generate.
 */
typedef struct dmd_generator dmd_generator;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Opens the ONNX file `path`. `*generator` is null unless the status is `DMD_STATUS_OK`; `dmd_close` frees it.

 `provider` is `auto`, `engine`, `cpu`, `cuda` or another that `dmd-run providers` lists; null is `auto`. `threads` is 0
 for one per core. `ort_lib` is the onnxruntime library to load; null searches for it as `dmd-run` does.

 # Safety
 Texts are null or end in a zero byte; `generator` is null or can be written.
 */
dmd_status dmd_open(const char *path,
                    const char *provider,
                    size_t threads,
                    const char *ort_lib,
                    dmd_generator **generator);

/*
 Opens an ONNX model of `len` bytes in memory, which are copied. For the rest see `dmd_open`.

 # Safety
 `bytes` is null or has `len` bytes; for the rest see [`dmd_open`].
 */
dmd_status dmd_open_memory(const uint8_t *bytes,
                           size_t len,
                           const char *provider,
                           size_t threads,
                           const char *ort_lib,
                           dmd_generator **generator);

/*
 What the model and its card say, and what runs it: JSON as of `dmd-run info --json`, with `provider` and `engine`.
 The text lives as long as the generator; null for a null generator.

 # Safety
 `generator` is null or open.
 */
const char *dmd_info(const dmd_generator *generator);

/*
 Writes channels, rows and columns of an image to `shape`.

 # Safety
 `generator` is null or open; `shape` is null or has room for three numbers.
 */
dmd_status dmd_shape(const dmd_generator *generator, size_t *shape);

/*
 Generates the images `first .. first + count` of a seed as bytes: image after image, row after row, channel fastest.
 Image `k` of a seed is always the same. `len` is the size of `pixels`, at least `count` * channels * rows * columns.

 # Safety
 `generator` is null or open; `pixels` is null or has room for `len` bytes.
 */
dmd_status dmd_generate_pixels(const dmd_generator *generator,
                               uint32_t seed,
                               uint64_t first,
                               size_t count,
                               int64_t class_id,
                               uint8_t *pixels,
                               size_t len);

/*
 Generates the same images as numbers in the model's range: `[count, channels, rows, columns]`, columns fastest. `len` is the
 size of `values` in numbers.

 # Safety
 `generator` is null or open; `values` is null or has room for `len` numbers.
 */
dmd_status dmd_generate_values(const dmd_generator *generator,
                               uint32_t seed,
                               uint64_t first,
                               size_t count,
                               int64_t class_id,
                               float *values,
                               size_t len);

/*
 Why the last function that failed in this thread did. The text lives until the next one fails in this thread.
 */
const char *dmd_last_error(void);

/*
 Frees a generator that no other thread uses any more. Null is fine.

 # Safety
 `generator` is null or open, and not used again.
 */
void dmd_close(dmd_generator *generator);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DMD_H */
