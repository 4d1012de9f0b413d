// A picture into an image tower's input, level by level as Pillow and torchvision make it in Python.

const PRECISION = 22; // bits behind the point in Pillow's weights

const cubic = (x) => {
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
};
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = {
  bilinear: [1, (x) => Math.max(1 - x, 0)],
  bicubic: [2, cubic],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

// For each of `after` points: the first of its sources among `before`, and their weights as whole numbers.
function weights(before, after, [support, filter]) {
  const scale = before / after;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: after }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), before);
    const shares = Array.from({ length: end - first }, (_, x) => filter(Math.abs((x + first - center + 0.5) / stretch)));
    const total = shares.reduce((sum, share) => sum + share, 0);
    const whole = shares.map((share) => Math.trunc((share / total) * 2 ** PRECISION + (share < 0 ? -0.5 : 0.5)));
    return [first, Int32Array.from(whole)];
  });
}

const clip = (sum) => Math.min(Math.max(sum >> PRECISION, 0), 255);

// One direction of a resize; `step` leads from pixel to pixel along it, `line` from line to line.
function along(data, lines, points, [step, line], [outStep, outLine]) {
  const out = new Uint8Array(lines * points.length * 3);
  for (let l = 0; l < lines; l++) {
    for (let i = 0; i < points.length; i++) {
      const [first, shares] = points[i];
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (PRECISION - 1);
        for (let k = 0, at = l * line + first * step + c; k < shares.length; k++, at += step) sum += data[at] * shares[k];
        out[l * outLine + i * outStep + c] = clip(sum);
      }
    }
  }
  return out;
}

/** An RGB picture {data, width, height} scaled with antialiasing, as Pillow's Image.resize does it. */
export function resize({ data, width, height }, newWidth, newHeight, interpolation) {
  if (newWidth !== width) {
    const points = weights(width, newWidth, FILTERS[interpolation]);
    data = along(data, height, points, [3, width * 3], [3, newWidth * 3]);
  }
  if (newHeight !== height) {
    const points = weights(height, newHeight, FILTERS[interpolation]);
    data = along(data, newWidth, points, [newWidth * 3, 3], [newWidth * 3, 3]);
  }
  return { data, width: newWidth, height: newHeight };
}

/** Scaled as TensorFlow 2 does it without antialiasing; the cast cuts off, so that all is in float32, in its order. */
export function resizeTensorflow({ data, width, height }, newWidth, newHeight) {
  const f = Math.fround;
  const sources = (before, after) => {
    const scale = f(before / after);
    return Array.from({ length: after }, (_, i) => {
      const point = f(f(f(i + 0.5) * scale) - 0.5);
      const floor = Math.floor(point);
      return [Math.max(floor, 0), Math.min(Math.ceil(point), before - 1), f(point - floor)];
    });
  };
  const [rows, columns] = [sources(height, newHeight), sources(width, newWidth)];
  const out = new Uint8Array(newWidth * newHeight * 3);
  const mix = (a, b, share) => f(a + f(f(b - a) * share));
  rows.forEach(([top, bottom, down], y) => columns.forEach(([left, right, across], x) => {
    for (let c = 0; c < 3; c++) {
      const value = (row, column) => data[(row * width + column) * 3 + c];
      const upper = mix(value(top, left), value(top, right), across);
      const lower = mix(value(bottom, left), value(bottom, right), across);
      out[(y * newWidth + x) * 3 + c] = mix(upper, lower, down);
    }
  }));
  return { data: out, width: newWidth, height: newHeight };
}

// Python rounds halves to the even neighbour.
const halfToEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

function crop({ data, width, height }, newWidth, newHeight) {
  const [left, top] = [halfToEven((width - newWidth) / 2), halfToEven((height - newHeight) / 2)];
  const out = new Uint8Array(newWidth * newHeight * 3);
  for (let y = 0; y < newHeight; y++) {
    const start = ((y + top) * width + left) * 3;
    out.set(data.subarray(start, start + newWidth * 3), y * newWidth * 3);
  }
  return { data: out, width: newWidth, height: newHeight };
}

/** An RGB picture as the tower wants it: float32 values from 0 to 255, [3, H, W]; `settings` are those of image.json. */
export function prepare(picture, settings) {
  const [height, width] = settings.size;
  let scaled;
  if (settings.interpolation === "tensorflow") {
    scaled = resizeTensorflow(picture, width, height);
  } else {
    const [tall, wide] = [height, width].map((side) => Math.floor(side / settings.crop_pct));
    const short = Math.min(picture.width, picture.height);
    const [newWidth, newHeight] = settings.crop_mode === "squash"
      ? [wide, tall]
      : [picture.width, picture.height].map((side) => Math.trunc((tall * side) / short));
    scaled = crop(resize(picture, newWidth, newHeight, settings.interpolation), width, height);
  }
  const count = width * height;
  const pixels = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) for (let c = 0; c < 3; c++) pixels[c * count + i] = scaled.data[i * 3 + c];
  return pixels;
}

/** The RGB picture of an image file: upright, its colour profile ignored, transparent parts on white. */
export async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name ?? "the file"} is not a picture that this browser can read`);
  }
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d");
  canvas.fillStyle = "white";
  canvas.fillRect(0, 0, width, height);
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = canvas.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    data[j++] = rgba[i];
    data[j++] = rgba[i + 1];
    data[j++] = rgba[i + 2];
  }
  return { data, width, height };
}
