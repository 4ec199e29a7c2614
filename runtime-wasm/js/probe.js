// Which WebAssembly instructions this browser has: the smallest modules that need them either compile or do not.

const SIMD128 = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
const RELAXED = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0, 65, 1, 253, 15, 65, 2, 253, 15, 253, 128,
  2, 11,
];

/** `relaxed-simd`, `simd128`, or null where the runtime cannot run. */
export function instructions() {
  const has = (bytes) => WebAssembly.validate(new Uint8Array(bytes));
  if (!has(SIMD128)) return null;
  return has(RELAXED) ? 'relaxed-simd' : 'simd128';
}
