// Uploads files with their progress, one after the other; files can be dropped anywhere on the page.
import { showMessage } from "./app.js";

const zone = document.getElementById("dropzone");
const form = document.getElementById("upload-form");
const list = document.getElementById("uploads");
const csrfToken = document.querySelector('meta[name="csrf-token"]').content;

const size = (bytes) => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${Math.ceil(bytes / 1024)} KiB`);

/** Models are .tar and .gguf files; anything else is data, unless the user chose otherwise. */
function purposeOf(file) {
  return /\.(tar|gguf)$/i.test(file.name) ? "model" : form.elements.purpose.value;
}

function upload(file) {
  return new Promise((resolve) => {
    const item = document.createElement("li");
    const bar = document.createElement("progress");
    bar.max = file.size || 1;
    bar.value = 0;
    bar.setAttribute("aria-label", `Upload of ${file.name}`);
    const text = document.createElement("span");
    const cancel = document.createElement("button");
    cancel.type = "button";
    cancel.textContent = "Cancel";
    item.append(`${file.name} `, text, cancel, bar);
    list.append(item);

    const request = new XMLHttpRequest();
    request.open("POST", zone.dataset.upload);
    request.setRequestHeader("X-CSRF-Token", csrfToken);
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      bar.max = total;
      bar.value = loaded;
      text.textContent = loaded < total ? `${size(loaded)} of ${size(total)} ` : "checking … ";
    });
    const finish = (message) => {
      cancel.remove();
      text.textContent = message;
      resolve(request.status === 201);
    };
    request.addEventListener("load", () => {
      let message = "uploaded";
      if (request.status !== 201) {
        item.classList.add("bad");
        try {
          message = JSON.parse(request.responseText).error.message;
        } catch {
          message = `The server answered ${request.status}.`;
        }
      }
      finish(message);
    });
    request.addEventListener("error", () => {
      item.classList.add("bad");
      finish("The connection was lost. Upload the file again.");
    });
    request.addEventListener("abort", () => finish("cancelled"));
    cancel.addEventListener("click", () => request.abort());
    const body = new FormData();
    body.append("purpose", purposeOf(file));
    body.append("file", file);
    request.send(body);
  });
}

async function uploadAll(files) {
  const tooLarge = files.find((file) => file.size > Number(zone.dataset.maxBytes));
  if (tooLarge) return showMessage(`${tooLarge.name} is larger than ${size(Number(zone.dataset.maxBytes))}, the limit of this service.`);
  let allStored = files.length > 0;
  for (const file of files) allStored = (await upload(file)) && allStored;
  if (allStored) location.assign(zone.dataset.done);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const files = [...form.elements.file.files];
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
