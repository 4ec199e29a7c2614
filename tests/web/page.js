// Driving the demo page: a browser and a server for a file of tests, the page's controls, what they show.

import assert from 'node:assert/strict';
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { after, before } from 'node:test';
import { difference, launch, serve, shownImages } from './support.js';

export const DESKTOP = { width: 1280, height: 900 };
export const PHONE = { width: 360, height: 740 };

let server;
let browser;

before(async () => {
  server = await serve();
  browser = await launch();
});

after(async () => {
  await browser?.close();
  server?.stop();
});

/** Opens the page, runs the test, and checks that nothing outside the server was asked and nothing logged. */
export async function onPage({ viewport = DESKTOP, colorScheme = 'light', search = '', hash = '', prepare, logs = false }, check) {
  const context = await browser.newContext({ viewport, colorScheme, acceptDownloads: true });
  const page = await context.newPage();
  const [foreign, logged] = [[], []];
  page.on('request', (r) => r.url().startsWith(server.url) || /^(data|blob):/.test(r.url()) || foreign.push(r.url()));
  page.on('console', (m) => ['error', 'warning'].includes(m.type()) && logged.push(m.text()));
  page.on('pageerror', (e) => logged.push(e.message));
  try {
    await prepare?.(page);
    await page.goto(server.url + search + hash);
    await check(page);
    assert.deepEqual(foreign, [], 'the page asked another server');
    if (!logs) assert.deepEqual(logged, [], 'the page logged problems');
  } finally {
    await context.close();
  }
}

export function settled(page) {
  return page.waitForFunction(() => ['ready', 'failed'].includes(window.dmd?.state), null, { timeout: 60_000 });
}

export async function generate(page, { seed, count, class: wanted = '' }) {
  await settled(page);
  await page.fill('#seed', String(seed));
  await page.fill('#count', String(count));
  await page.selectOption('#class', String(wanted));
  await page.click('#generate');
  await settled(page);
  assert.equal(await page.evaluate(() => window.dmd.state), 'ready');
  return shownImages(page);
}

export async function screenshot(page, name) {
  const folder = process.env.DMD_SCREENSHOTS;
  if (!folder) return;
  await mkdir(folder, { recursive: true });
  await page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
}

export function assertSame(shown, native) {
  assert.equal(shown.length, native.length);
  let total = 0;
  shown.forEach(({ rgba }, i) => {
    const { worst, differing } = difference(rgba, native[i]);
    assert.ok(worst <= 1, `image ${i} differs from the native runtime by ${worst} levels, expected at most 1`);
    total += differing;
  });
  return total;
}

export async function assertFailed(page, pattern) {
  await settled(page);
  assert.match(await page.innerText('#error'), pattern);
  assert.equal(await page.isVisible('#loading'), false);
  assert.equal(await page.isDisabled('#generate'), true);
}

/** The controls that lie on top of another one. */
export function overlaps(page) {
  return page.evaluate(() => {
    const controls = [...document.querySelectorAll('#fields :is(input, select, button)')].filter((c) => c.offsetParent);
    const boxes = controls.map((c) => [c.id, c.getBoundingClientRect()]);
    return boxes.flatMap(([a, one], i) => boxes.slice(i + 1)
      .filter(([, two]) => one.left < two.right && two.left < one.right && one.top < two.bottom && two.top < one.bottom)
      .map(([b]) => `${a} and ${b}`));
  });
}

export function overflow(page) {
  return page.evaluate(() => document.scrollingElement.scrollWidth - window.innerWidth);
}
