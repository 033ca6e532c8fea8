// The place for uploads on a page: chosen or dropped files, their progress, and uploads that were interrupted.
import { showMessage } from "./app.js";
import { ResumableUpload, discard, storedBytes, unfinishedUploads } from "./resumable_upload.js";
import { archiveOf } from "./tar.js";

const zone = document.getElementById("dropzone");
const input = document.getElementById("upload-file");
const list = document.getElementById("uploads");
const announcement = document.getElementById("upload-state");
const { upload: url, done, select, maxBytes } = zone.dataset;

const size = (bytes) => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${Math.ceil(bytes / 1024)} KiB`);

/** Models are .tar and .gguf files; anything else is data, unless the user chose otherwise. A form asks for data. */
function purposeOf(file) {
  if (select) return "fine-tune";
  const isModel = /\.(tar|gguf)$/i.test(file.name) || document.getElementById("upload-purpose")?.value === "model";
  return isModel ? "user_data" : "fine-tune";
}

/** A line of the list: a file with its state, its progress, and one button. */
class UploadItem {
  constructor(name, total, buttonText) {
    this.name = name;
    this.total = total;
    this.text = document.createElement("span");
    this.bar = document.createElement("progress");
    this.bar.max = total || 1;
    this.bar.value = 0;
    this.bar.setAttribute("aria-label", `Upload of ${name}`);
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.append(buttonText, Object.assign(document.createElement("span"), { className: "visually-hidden", textContent: ` ${name}` }));
    this.element = document.createElement("li");
    this.element.append(`${name}: `, this.text, this.button, this.bar);
    list.append(this.element);
  }

  progress(sent) {
    this.bar.value = sent;
    this.element.classList.remove("waiting");
    this.text.textContent = sent < this.total ? `${size(sent)} of ${size(this.total)}` : "checking …";
  }

  say(text, kind = "") {
    this.element.className = kind;
    this.text.textContent = text;
    announcement.textContent = `${this.name}: ${text}`;
  }

  end(text, kind = "") {
    this.button.remove();
    this.bar.remove();
    this.say(text, kind);
  }
}

/** Upload one file, and return its id; `null` if it was cancelled or failed. */
async function upload(file) {
  const item = new UploadItem(file.name, file.size, "Cancel");
  const running = new ResumableUpload(url, file, purposeOf(file), {
    progress: (sent) => item.progress(sent),
    waiting: (message) => item.say(message, "waiting"),
  });
  item.button.addEventListener("click", () => running.cancel());
  try {
    const id = await running.run();
    item.end("uploaded");
    return id;
  } catch (error) {
    if (error.name === "AbortError") item.end("cancelled");
    else item.end(error.message, "bad");
    return null;
  }
}

async function uploadAll(chosen) {
  const files = chosen.map((file) => (/\.gguf$/i.test(file.name) && !select ? archiveOf(file) : file));
  const tooLarge = files.find((file) => file.size > Number(maxBytes));
  if (tooLarge) return showMessage(`${tooLarge.name} is larger than ${size(Number(maxBytes))}, the limit for uploads.`);
  showInterrupted(files);
  const stored = [];
  for (const file of files) stored.push([file, await upload(file)]);
  if (stored.length === 0 || stored.some(([, id]) => id === null)) return;
  if (done) location.assign(done);
  else choose(...stored.at(-1));
}

/** Choose the new file in the form. */
function choose(file, id) {
  const menu = document.getElementById(select);
  menu.append(new Option(file.name, id, true, true));
  menu.dispatchEvent(new Event("input", { bubbles: true }));
  menu.focus();
}

/** Lists the uploads that were interrupted, except those of `chosen` files. */
function showInterrupted(chosen = []) {
  list.replaceChildren();
  for (const record of unfinishedUploads()) {
    if (chosen.some(({ name }) => name === record.name)) continue;
    const item = new UploadItem(record.name, record.size, "Discard");
    item.progress(storedBytes(record));
    item.text.textContent = `interrupted at ${size(storedBytes(record))} of ${size(record.size)}. Choose the file again to continue.`;
    item.element.className = "waiting";
    item.button.addEventListener("click", () => {
      item.element.remove();
      discard(url, record);
    });
  }
}

if (select) input.addEventListener("change", () => uploadAll([...input.files]));
document.getElementById("upload-button")?.addEventListener("click", () => {
  const files = [...input.files];
  if (files.length) uploadAll(files);
  else showMessage("Choose a file first.", "warn");
});
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", type === "dragover");
    if (type === "drop") uploadAll([...event.dataTransfer.files]);
  });
}
showInterrupted();
