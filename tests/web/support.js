// What the browser tests need around the page: the demo's own server, a browser, the native runtime's images.

import { execFile, spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { chromium } from 'playwright-core';

const ROOT = path.resolve(import.meta.dirname, '../..');
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];

/** A variable that scripts/test-web sets. */
export function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`\`${name}\` is not set; run scripts/test-web`);
  return value;
}

/** Serves the assembled folder with the demo's own server: its address, and a function that stops it. */
export async function serve() {
  const script = path.join(ROOT, 'scripts/web_server.py');
  const server = spawn('python3', [script, setting('DMD_WEB_SITE')], { stdio: ['ignore', 'pipe', 'inherit'] });
  const url = await new Promise((resolve, reject) => {
    server.stdout.once('data', (line) => resolve(line.toString().trim()));
    server.once('error', reject);
    server.once('exit', (code) => reject(new Error(`web_server.py ended with ${code}`)));
  });
  return { url, stop: () => server.kill() };
}

export function launch() {
  return chromium.launch({ executablePath: setting('CHROMIUM'), headless: true, args: FLAGS });
}

/** The engines of dmd-run that a page is compared with: the same engine natively, and onnxruntime. */
export const PROVIDERS = ['tract', 'cpu'];

/** The levels that dmd-run gives for the same request, image by image, as the bytes of a grey or RGB picture. */
export async function nativeImages({ seed, count, class: wanted, steps, model, provider = PROVIDERS[0] }) {
  const folder = await mkdtemp(path.join(tmpdir(), 'dmd-web-'));
  try {
    const file = path.join(folder, 'native.npy');
    const onnx = model ?? path.join(setting('DMD_WEB_SITE'), 'model.onnx');
    const args = [onnx, '--seed', seed, '--count', count, '--provider', provider, '--threads', 1, '-o', file];
    if (wanted !== undefined) args.push('--class', wanted);
    if (steps !== undefined) args.push('--steps', steps);
    await promisify(execFile)(setting('DMD_RUN'), args.map(String));
    return levels(readNpy(await readFile(file)));
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** `work` on every item, in order; as many at a time as there are cores. */
export async function inParallel(items, work) {
  const results = [];
  const queue = [...items.entries()];
  const worker = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) results[next[0]] = await work(next[1]);
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
  return results;
}

function readNpy(bytes) {
  if (bytes.toString('latin1', 0, 6) !== '\x93NUMPY' || bytes[6] !== 1) throw new Error('not an npy file of version 1');
  const start = 10 + bytes.readUInt16LE(8);
  const header = bytes.toString('latin1', 10, start);
  if (!header.includes("'<f4'") || !header.includes("'fortran_order': False")) throw new Error(`npy header ${header}`);
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(',').filter((n) => n.trim()).map(Number);
  const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length));
  if (shape.length !== 4 || values.length !== shape.reduce((a, b) => a * b)) throw new Error(`npy shape ${shape}`);
  return { shape, values };
}

/** The project's rounding rule on values in [-1, 1]: floor(clamp((v + 1) / 2, 0, 1) · 255 + 0.5), in f32. */
function levels({ shape: [count, channels, height, width], values }) {
  const plane = height * width;
  const level = (v) => {
    const unit = Math.min(Math.max(Math.fround(Math.fround(v + 1) / 2), 0), 1);
    return Math.floor(Math.fround(Math.fround(unit * 255) + 0.5));
  };
  return Array.from({ length: count }, (_, n) => Array.from({ length: plane * channels }, (_, i) =>
    level(values[n * plane * channels + (i % channels) * plane + Math.floor(i / channels)])));
}

/** What the page shows: per tile its caption and the picture on its canvas. */
export function shownImages(page) {
  return page.evaluate(() => [...document.querySelectorAll('#gallery figure')].map((tile) => {
    const canvas = tile.querySelector('canvas');
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return { caption: tile.querySelector('figcaption').textContent, rgba: [...data] };
  }));
}

/** Largest difference of a shown RGBA picture to native levels, and how many levels differ at all. */
export function difference(rgba, native) {
  const channels = native.length / (rgba.length / 4);
  let [worst, differing] = [0, 0];
  for (let i = 0; i < rgba.length; i += 4) {
    for (let c = 0; c < 3; c++) {
      const gap = Math.abs(rgba[i + c] - native[(i / 4) * channels + (channels === 1 ? 0 : c)]);
      worst = Math.max(worst, gap);
      differing += gap > 0 ? 1 : 0;
    }
    if (rgba[i + 3] !== 255) worst = 255;
  }
  return { worst, differing };
}
