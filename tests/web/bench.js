// Measures the browser's runtime against onnxruntime-web in headless Chromium. Run by scripts/bench-web, which puts both, the
// models and the pages of `bench/` into one folder. usage: bench.js ROUNDS [FILE.json]

import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { launch, serve, setting } from './support.js';

const NETWORKS = { bundled: 4, '3m': 1, cifar: 0.4 };
const COLD_STARTS = 7;

const [rounds, json] = [Number(process.argv[2]), process.argv[3]];
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
const spread = (values) => `${median(values).toFixed(1)} ms (${Math.min(...values).toFixed(1)} to ${Math.max(...values).toFixed(1)})`;

const server = await serve();
const browser = await launch();

/** Opens a page with nothing cached, works on it, and closes it. */
async function onPage(name, work) {
  const context = await browser.newContext();
  const page = await context.newPage();
  page.setDefaultTimeout(600_000);
  try {
    await page.goto(`${server.url}bench/${name}`);
    return await work(page);
  } finally {
    await context.close();
  }
}

const speedPage = (work, threads = 1) => onPage(`speed.html?threads=${threads}`, async (page) => {
  await page.waitForFunction(() => window.loaded);
  return work(page);
});

const figures = {};
const about = JSON.parse(setting('DMD_ABOUT'));
const versions = { ...about.versions, chromium: browser.version() };
const results = { ...about, versions, rounds, networks: {}, threads2: {}, workers: {}, cold: {}, memory: {} };
try {
  for (const [name, factor] of Object.entries(NETWORKS)) {
    const count = Math.max(3, Math.round(rounds * factor));
    const { times, instructions } = await speedPage((page) => page.evaluate(([n, c]) => window.speed(n, c), [name, count]));
    results.networks[name] = times;
    results.instructions = instructions;
    console.log(`${name}: ours ${spread(times.ours)}, onnxruntime-web ${spread(times.same)}, on PyTorch's export ${spread(times.naive)}`);
    figures[`tract_vs_ortweb_1t_${name}`] = median(times.ours) / median(times.same);
    figures[`tract_vs_ortweb_naive_1t_${name}`] = median(times.ours) / median(times.naive);
    const two = await speedPage((page) => page.evaluate(([n, c]) => window.speed(n, c), [name, count]), 2);
    results.threads2[name] = two.times;
    console.log(`${name}: ours with 1 thread ${spread(two.times.ours)}, onnxruntime-web with 2 ${spread(two.times.same)}`);
    figures[`tract_1t_vs_ortweb_2t_${name}`] = median(two.times.ours) / median(two.times.same);
  }
  for (const [name, images] of [['bundled', 64], ['3m', 16]]) {
    const [one, two] = await speedPage((page) => page.evaluate((job) => window.workers(...job), [name, images, rounds]));
    results.workers[name] = { images, one, two };
    console.log(`${name}, ${images} images: one worker ${spread(one)}, two ${spread(two)}`);
    figures[`workers_2_vs_1_${name}`] = median(two) / median(one);
  }
  results.cold = { ours: [], ort: [] };
  for (let i = 0; i < COLD_STARTS; i++) {
    for (const who of i % 2 ? ['ort', 'ours'] : ['ours', 'ort']) {
      results.cold[who].push(await onPage(`cold-${who}.html`, async (page) => {
        await page.waitForFunction(() => window.first);
        return page.evaluate(() => window.first);
      }));
    }
  }
  console.log(`cold start: ours ${spread(results.cold.ours)}, onnxruntime-web ${spread(results.cold.ort)}`);
  figures.cold_start_vs_ortweb = median(results.cold.ours) / median(results.cold.ort);
  for (const [file, count] of [['bundled', 500], ['cifar', 2], ['cifar-int8', 2]]) {
    const [early, late] = await speedPage((page) => page.evaluate(([f, c]) => window.memory(f, c), [file, count]));
    results.memory[file] = { images: count, first: early, last: late };
    figures[`wasm_memory_mb_${file.replace('-', '_')}`] = late / 1e6;
  }
  figures.wasm_memory_growth_500 = results.memory.bundled.last - results.memory.bundled.first;
} finally {
  await browser.close();
  server.stop();
}
for (const [build, name] of [['simd128', 'wasm_gzip_bytes'], ['relaxed-simd', 'wasm_gzip_bytes_relaxed']]) {
  const bytes = await readFile(path.join(setting('DMD_WEB_SITE'), `pkg/${build}/dmd_runtime_wasm_bg.wasm`));
  figures[name] = gzipSync(bytes, { level: 9 }).length;
}
if (json) await writeFile(json, `${JSON.stringify({ ...results, figures }, null, 1)}\n`);
for (const [name, value] of Object.entries(figures)) console.log(`figure ${name} ${Number.isInteger(value) ? value : value.toFixed(3)}`);
