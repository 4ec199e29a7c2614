// Small things that all parts of the page use: elements, numbers as people read them, pictures as files.

export const $ = (id) => document.getElementById(id);

export function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

/** The function's result; none if it throws. */
export function attempt(work) {
  try {
    return work();
  } catch {
    return undefined;
  }
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
}

export function compact(number) {
  return new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 }).format(number);
}

export function duration(milliseconds) {
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(1)}\u00a0s`;
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)}\u00a0ms`;
}

/** Shows a picture on a canvas of its size. */
export function draw(canvas, image) {
  if (canvas.width !== image.width || canvas.height !== image.height) {
    [canvas.width, canvas.height] = [image.width, image.height];
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}

/** Saves canvases of one size as a PNG, side by side in rows of `columns`, enlarged, on white. */
export function savePng(name, canvases, columns) {
  const [scale, gap] = [4, 2];
  const { width, height } = canvases[0];
  const sheet = document.createElement('canvas');
  sheet.width = (columns * (width + gap) + gap) * scale;
  sheet.height = (Math.ceil(canvases.length / columns) * (height + gap) + gap) * scale;
  const context = sheet.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.imageSmoothingEnabled = false;
  for (const [i, canvas] of canvases.entries()) {
    const left = (gap + (i % columns) * (width + gap)) * scale;
    const top = (gap + Math.floor(i / columns) * (height + gap)) * scale;
    context.drawImage(canvas, left, top, width * scale, height * scale);
  }
  const link = document.createElement('a');
  link.download = name;
  link.href = sheet.toDataURL('image/png');
  link.click();
}
