// Pictures as files, as base64 in a request, and as pixels.

const MOST_BYTES = 5e6; // of one picture: a request to RunPod's /run may have 10 MB, in base64
const MOST_SIDE = 2048; // pixels: what a worker draws at most
// What a browser shows: a file that says it is one of these and cannot be read is broken.
const SHOWN = /^image\/(png|jpeg|webp|gif|bmp|avif)$/;

/** The bytes of a file in base64. @param {Blob} blob @returns {Promise<string>} */
export function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result).replace(/^[^,]*,?/, ""));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** @returns {Blob} */
export function fromBase64(text, type = "") {
  const bytes = atob(text.replace(/^data:[^,]*,/, ""));
  return new Blob([Uint8Array.from(bytes, (character) => character.charCodeAt(0))], { type });
}

/** Its upright pixels, or null where this browser cannot read it. */
export async function decode(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return null;
  }
}

/** A canvas as a file. @returns {Promise<Blob>} */
export const encode = (canvas, type = "image/png", quality = undefined) =>
  new Promise((resolve, reject) => canvas.toBlob(
    (blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large for this browser."))), type, quality));

/**
 * A file as a request may carry it, and what there is to say of that. Raises an Error where it is no picture.
 * @param {File} file
 * @returns {Promise<{blob: Blob, note: string}>}
 */
export async function prepare(file) {
  const pixels = await decode(file);
  if (!pixels) {
    if (!file.type.startsWith("image/")) throw new Error(`${file.name} is not a picture.`);
    if (SHOWN.test(file.type)) throw new Error(`${file.name} is broken: its pixels cannot be read.`);
    return { blob: file, note: "This browser cannot show it; the worker may be able to read it." };
  }
  if (file.size <= MOST_BYTES) return { blob: file, note: "" };
  const scale = Math.min(1, MOST_SIDE / Math.max(pixels.width, pixels.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(pixels.width * scale));
  canvas.height = Math.max(1, Math.round(pixels.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(pixels, 0, 0, canvas.width, canvas.height);
  let blob = await encode(canvas);
  if (blob.size > MOST_BYTES) blob = await encode(canvas, "image/jpeg", 0.95);
  const from = `${pixels.width}x${pixels.height}, ${inWords(file.size)}`;
  return { blob, note: `Made smaller for the way to the worker: it was ${from}.` };
}

/** Bytes, as people read them. */
export const inWords = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} KB` : `${(bytes / 1e6).toFixed(1)} MB`);
