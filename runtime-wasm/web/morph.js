// The stage: noise on the arc between two seeds, what the generator makes of it at once, and what a teacher makes of it.

import { $, draw, duration, savePng } from './format.js';

const FADE = 1100;

/** Sets the stage up on the page's state. */
export function morph(page) {
  let teacher = null;
  let [wanted, working] = [false, false];
  let playing = null;
  let shown = null;

  for (const id of ['seed-a', 'seed-b', 'morph-class']) $(id).addEventListener('change', () => update({ settled: true }));
  $('share').addEventListener('input', () => update({}));
  $('share').addEventListener('change', () => update({ settled: true }));
  $('teacher-steps').addEventListener('change', () => runTeacher());
  $('play').addEventListener('click', () => (playing ? pause() : play()));
  $('from-noise').addEventListener('click', () => fade());
  $('morph-save').addEventListener('click', () => {
    const canvases = [$('morph-noise'), $('morph-image'), $('teacher-image')].filter((canvas) => !canvas.hidden);
    savePng(`one-step-seeds-${$('seed-a').value}-${$('seed-b').value}.png`, canvases, canvases.length);
  });

  function options() {
    const selected = $('morph-class').value;
    return {
      seed: $('seed-a').valueAsNumber,
      class: selected === '' ? undefined : Number(selected),
      towards: { seed: $('seed-b').valueAsNumber, share: $('share').valueAsNumber },
    };
  }

  /** Shows the place of the slider; while a picture is made, only the last place asked for is remembered. */
  async function update({ settled = false }) {
    wanted = true;
    if (settled) runTeacher();
    if (working || !$('seed-a').reportValidity() || !$('seed-b').reportValidity()) return;
    working = true;
    try {
      while (wanted && page.generator) {
        wanted = false;
        const [{ generator }, request] = [page, options()];
        let milliseconds = 0;
        const [[noise], [image]] = await Promise.all([
          generator.noise(request),
          generator.generate(request, { onImage: (_, made) => { milliseconds = made.milliseconds; } }),
        ]);
        if (generator !== page.generator) continue;
        shown = { noise, image };
        draw($('morph-noise'), noise);
        draw($('morph-image'), image);
        const steps = page.info.steps === 1 ? '1 step' : `${page.info.steps} steps`;
        $('morph-caption').textContent = `${steps} · ${duration(milliseconds)}`;
        page.lastMorph = { ...request, pixels: image.data };
      }
    } catch (error) {
      if (error.name !== 'AbortError') problem(error);
    } finally {
      working = false;
    }
  }

  /** The slider goes there and back until it is stopped. */
  function play() {
    $('play').textContent = 'Pause';
    $('play').setAttribute('aria-pressed', 'true');
    const [start, from] = [performance.now(), Math.acos(1 - 2 * $('share').valueAsNumber)];
    const frame = (now) => {
      $('share').value = (1 - Math.cos(from + (now - start) / 1500)) / 2;
      update({});
      playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
  }

  function pause() {
    cancelAnimationFrame(playing);
    playing = null;
    $('play').textContent = 'Play';
    $('play').setAttribute('aria-pressed', 'false');
    update({ settled: true });
  }

  /** Fades from the noise to the picture; at once where less motion is wanted. */
  function fade() {
    if (!shown || matchMedia('(prefers-reduced-motion: reduce)').matches) return;
    const { noise, image } = shown;
    const [start, mixed] = [performance.now(), new ImageData(image.width, image.height)];
    const frame = (now) => {
      if (shown.image !== image) return;
      const time = Math.min((now - start) / FADE, 1);
      const share = time * time * (3 - 2 * time);
      for (let i = 0; i < mixed.data.length; i++) mixed.data[i] = noise.data[i] + share * (image.data[i] - noise.data[i]);
      draw($('morph-image'), mixed);
      if (time < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  async function runTeacher() {
    const [asked, steps] = [teacher, $('teacher-steps')];
    if (!asked || !steps.reportValidity()) return;
    asked.job?.abort();
    asked.job = new AbortController();
    const { signal } = asked.job;
    $('teacher-caption').textContent = `${steps.value} steps…`;
    try {
      let milliseconds = 0;
      const request = { ...options(), steps: steps.valueAsNumber };
      const onImage = (_, made) => { milliseconds = made.milliseconds; };
      const [image] = await asked.generator.generate(request, { signal, onImage });
      draw($('teacher-image'), image);
      $('teacher-caption').textContent = `teacher, ${request.steps} steps · ${duration(milliseconds)}`;
      page.lastTeacher = { ...request, pixels: image.data };
    } catch (error) {
      if (error.name !== 'AbortError') problem(error);
    }
  }

  function problem(error) {
    $('morph-error').textContent = error.message;
    $('morph-error').hidden = false;
  }

  /** Shows a teacher beside the generator, if their images are of one size. */
  function setTeacher(generator) {
    const [ours, theirs] = [page.info.image, generator.info.image];
    if (['channels', 'height', 'width'].some((side) => ours[side] !== theirs[side])) {
      generator.free();
      const size = ({ channels, height, width }) => `${width} × ${height} with ${channels} channels`;
      problem(new Error(`got a teacher of images of ${size(theirs)}, expected ${size(ours)}`));
      return;
    }
    teacher?.generator.free();
    teacher = { generator, job: null };
    $('morph-error').hidden = true;
    $('teacher-open').hidden = true;
    $('teacher-image').hidden = false;
    $('teacher-steps-field').hidden = false;
    $('teacher-steps').value = generator.info.steps;
    runTeacher();
  }

  /** Starts again for the page's model; a teacher of other images goes. */
  function reset() {
    if (playing) pause();
    teacher?.generator.free();
    teacher = null;
    shown = null;
    $('teacher-open').hidden = false;
    $('teacher-image').hidden = true;
    $('teacher-steps-field').hidden = true;
    $('teacher-caption').textContent = 'many steps';
    $('morph-error').hidden = true;
    const { classes, kind } = page.info;
    const name = (i) => classes.names[i] ?? `class ${i}`;
    $('morph-class').replaceChildren(...Array.from({ length: classes?.count ?? 0 }, (_, i) => new Option(name(i), i)));
    $('morph-class-field').hidden = !classes;
    $('teacher-figure').hidden = kind === 'teacher';
    $('morph').hidden = false;
    update({});
  }

  return { reset, setTeacher, problem };
}
