// The gallery: the images of one seed, made one after the other by each worker.

import { $, draw, duration, element, savePng } from './format.js';

/** Sets the gallery up on the page's state; `fail` shows what goes wrong. */
export function gallery(page, fail) {
  let run = null;

  $('controls').addEventListener('submit', (event) => {
    event.preventDefault();
    if (run) stop();
    else generate();
  });
  $('random').addEventListener('click', () => {
    [$('seed').value] = crypto.getRandomValues(new Uint32Array(1));
    stop();
    generate();
  });
  $('save').addEventListener('click', () => {
    const canvases = [...document.querySelectorAll('#gallery canvas')];
    savePng(`one-step-seed-${page.lastRun.seed}.png`, canvases, Math.ceil(Math.sqrt(canvases.length)));
  });

  async function generate() {
    if (page.state === 'failed' || !page.info || !$('controls').reportValidity()) return;
    const selected = $('class').value;
    const job = {
      job: (page.lastRun?.job ?? 0) + 1,
      seed: $('seed').valueAsNumber,
      count: $('count').valueAsNumber,
      class: selected === '' ? undefined : Number(selected),
      start: performance.now(),
      times: [],
    };
    run = job;
    Object.assign(page, { lastRun: job, lastImages: [], state: 'generating' });
    rememberInAddress(job);
    $('error').hidden = true;
    $('save').hidden = true;
    $('gallery').replaceChildren(...Array.from({ length: job.count }, emptyTile));
    $('generate').textContent = 'Stop';
    const { generator } = page;
    try {
      // One by one for each worker: the slider's pictures come in between.
      let next = 0;
      const lane = async () => {
        while (next < job.count && run === job) {
          const options = { seed: job.seed, class: job.class, first: next++ };
          await generator.generate(options, { onImage: (image, made) => run === job && show(job, image, made) });
        }
      };
      await Promise.all(Array.from({ length: generator.info.threads }, lane));
    } catch (error) {
      if (run === job) fail(error);
    }
    if (run === job) finish(job);
  }

  function show(job, picture, { image, milliseconds }) {
    const { names, count } = page.info.classes ?? {};
    const index = count === undefined ? null : job.class ?? image % count;
    const tile = $('gallery').children[image];
    const canvas = tile.querySelector('canvas');
    draw(canvas, picture);
    const caption = index === null ? `${image}` : names[index] ?? `class ${index}`;
    canvas.setAttribute('aria-label', `Image ${image}${index === null ? '' : `: ${caption}`}`);
    tile.querySelector('figcaption').textContent = caption;
    tile.title = `${caption}\nseed ${job.seed}, image ${image}, ${duration(milliseconds)}`;
    tile.classList.add('done');
    const { width, height, data: pixels } = picture;
    page.lastImages.push({ image, class: index, width, height, pixels, milliseconds });
    job.times.push(milliseconds);
    $('status').textContent = `${job.times.length} of ${job.count} images…`;
  }

  function finish({ count, start, times }) {
    const mean = times.reduce((sum, t) => sum + t, 0) / times.length;
    page.lastImages.sort((a, b) => a.image - b.image);
    $('status').replaceChildren(
      element('strong', `${duration(mean)} per image`),
      ` · ${count} in ${duration(performance.now() - start)}`,
    );
    $('save').hidden = false;
    end('ready');
  }

  function stop() {
    if (!run) return;
    clear();
    $('status').textContent = `Stopped after ${run.times.length} of ${run.count} images`;
    $('save').hidden = run.times.length === 0;
    end('ready');
  }

  function clear() {
    for (const tile of document.querySelectorAll('#gallery figure:not(.done)')) tile.remove();
  }

  function end(state) {
    run = null;
    page.state = state;
    $('generate').textContent = 'Generate';
  }

  function emptyTile() {
    const tile = document.createElement('figure');
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [page.info.image.width, page.info.image.height];
    canvas.setAttribute('role', 'img');
    tile.append(canvas, element('figcaption', '\u00a0'));
    return tile;
  }

  return { generate, clear, end };
}

/** Takes seed and count from the page's address. */
export function restoreFromAddress() {
  const saved = new URLSearchParams(location.hash.slice(1));
  for (const id of ['seed', 'count']) if (saved.has(id)) $(id).value = saved.get(id);
}

function rememberInAddress(job) {
  const saved = new URLSearchParams({ seed: job.seed, count: job.count });
  if (job.class !== undefined) saved.set('class', job.class);
  history.replaceState(null, '', `#${saved}`);
}
