// A request as a command, as a program and as a link.

import { API, IS_LOCAL } from "./api.js";

const NESTED = { init_images: null, controls: "image" }; // lists that hold pictures, and where in an entry
const PICTURES = new Set(["init_image", "mask_image", "control_image", "image_prompt"]);
const KEY = IS_LOCAL ? "WEB_TOKEN" : "RUNPOD_API_KEY";

const isFile = (value) => typeof value === "string" && value !== "" && !/^https?:/i.test(value);

/**
 * A request without the files in it, each replaced by what `instead` gives for its name.
 * @param {any} request
 * @param {(name: string, base64: string) => any} instead undefined leaves the field out
 */
export function withoutFiles(request, instead) {
  const entries = Object.entries(request).map(([name, value]) => {
    if (PICTURES.has(name) && isFile(value)) return [name, instead(name, value)];
    if (name in NESTED && Array.isArray(value)) {
      const inner = NESTED[name];
      const list = value.map((each, i) => {
        const picture = inner ? each[inner] : each;
        if (!isFile(picture)) return each;
        const put = instead(`${name}_${i + 1}`, picture);
        return inner ? { ...each, [inner]: put } : put;
      });
      return [name, list.some((each) => (inner ? each[inner] : each) === undefined) ? undefined : list];
    }
    return [name, value];
  });
  return Object.fromEntries(entries.filter(([, value]) => value !== undefined));
}

/** The files of a request, by their names. @returns {[string, string][]} */
export function filesOf(request) {
  const files = [];
  withoutFiles(request, (name, base64) => { files.push([name, base64]); });
  return files;
}

/** JSON with a mark where the file `name` belongs. */
const mark = (name) => `\u0001${name}\u0001`;
const MARK = /"\\u0001(\w+)\\u0001"/;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A command for a POSIX shell; files of the request are read from the folder that it is run in. */
export function asCurl(request) {
  const json = JSON.stringify({ input: withoutFiles(request, mark) });
  const parts = json.split(MARK); // text, name, text, name ... text
  const files = parts.filter((_, i) => i % 2);
  const data = files.length
    ? `{ ${parts.map((part, i) => (i % 2 ? `base64 < ${part}.png | tr -d '\\n'; ` : `printf %s ${quoted(
      `${i ? '"' : ""}${part}${i < parts.length - 1 ? '"' : ""}`)}; `)).join("")}} | `
    : "";
  const note = files.length ? `# in a folder with ${files.map((name) => `${name}.png`).join(", ")}\n` : "";
  return `${note}${data}curl -X POST ${API}/runsync \\
  -H "Authorization: Bearer $${KEY}" -H "Content-Type: application/json" \\
  -d ${files.length ? "@-" : quoted(json)}
`;
}

const PYTHON = { true: "True", false: "False", null: "None" };

/** A value as Python writes it. */
function inPython(value, indent) {
  const deeper = `${indent}    `;
  if (typeof value === "string") {
    const name = MARK.exec(JSON.stringify(value))?.[1];
    return name ? `file("${name}.png")` : JSON.stringify(value);
  }
  if (Array.isArray(value)) return `[${value.map((each) => inPython(each, indent)).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const lines = Object.entries(value).map(([name, each]) => `${deeper}"${name}": ${inPython(each, deeper)},\n`);
    return `{\n${lines.join("")}${indent}}`;
  }
  return PYTHON[String(value)] ?? String(value);
}

/** A program that needs the package requests alone. */
export function asPython(request) {
  const files = filesOf(request).length > 0;
  const file = `

def file(name):
    """A picture of this folder, as a request carries it."""
    return base64.b64encode(Path(name).read_bytes()).decode()

`;
  return `import base64
import os
from pathlib import Path

import requests
${files ? file : ""}
answer = requests.post(
    "${API}/runsync",
    headers={"Authorization": f"Bearer {os.environ.get('${KEY}', '')}"},
    json={"input": ${inPython(withoutFiles(request, mark), "    ")}},
    timeout=600,
).json()
if answer.get("status") != "COMPLETED":
    raise SystemExit(answer)
output = answer["output"]
suffix = output["metadata"]["output_format"].lower()
for seed, picture in zip(output["metadata"]["seeds"], output["images"]):
    Path(f"{seed}.{suffix}").write_bytes(base64.b64decode(picture))
`;
}

/** An address of this page that fills the form, and the names of the files that it leaves out. */
export function asLink(request) {
  const plain = withoutFiles(request, () => undefined);
  const left = Object.keys(request).filter((name) => !(name in plain));
  const address = `${location.origin}${location.pathname}#request=${encodeURIComponent(JSON.stringify(plain))}`;
  return { address, left };
}

/** The request of the address bar, which it is taken out of; null where it holds none. Raises where it is damaged. */
export function requestOfLink() {
  const text = /[#&]request=([^&]*)/.exec(location.hash)?.[1];
  if (text === undefined) return null;
  history.replaceState(null, "", location.pathname + location.search);
  let request = null;
  try { request = JSON.parse(decodeURIComponent(text)); } catch { /* said below */ }
  if (request === null || typeof request !== "object" || Array.isArray(request)) {
    throw new Error("The link is damaged: its request cannot be read.");
  }
  return request;
}
