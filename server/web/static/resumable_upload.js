// Uploads a file in parts. It continues after a lost connection, a restart of the server or a reload of the page.
//
// The browser remembers the stored parts of each unfinished upload. A page can't keep access to a file, so after a
// reload the user chooses the file again, and only its missing parts are sent.
import { connection, csrfToken } from "./app.js";

const PART_BYTES = 8 * 2 ** 20;
const FIRST_RETRY_SECONDS = 1;
const LAST_RETRY_SECONDS = 15;
const STORAGE_KEY = "zeta.uploads";
const TEMPORARY = [0, 408, 429, 502, 503, 504]; // 0: no response
const GONE = ["upload_not_found", "upload_not_pending"]; // the upload has expired, or was cancelled elsewhere

/** An error that repeating the request doesn't solve; `status` and `code` are those of the service's response. */
export class UploadError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The unfinished uploads of this browser: `{id, name, size, lastModified, purpose, partIds}`. */
export function unfinishedUploads() {
  try {
    return JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? [];
  } catch {
    return []; // the browser allows no storage, or another version wrote it
  }
}

function remember(record) {
  store([...unfinishedUploads().filter(({ id }) => id !== record.id), record]);
}

function forget(record) {
  store(unfinishedUploads().filter(({ id }) => id !== record.id));
}

function store(records) {
  try {
    localStorage.setItem(STORAGE_KEY, JSON.stringify(records));
  } catch {
    // Without storage, an upload can't be continued after a reload.
  }
}

/** The number of bytes that the service has stored. */
export function storedBytes(record) {
  return Math.min(record.size, record.partIds.length * PART_BYTES);
}

/** Cancel an unfinished upload on the service, which removes its parts. */
export async function discard(url, record) {
  forget(record);
  await send(`${url}/${record.id}/cancel`, null, {}).catch(() => {});
}

export class ResumableUpload {
  /**
   * @param {string} url of the uploads
   * @param {File} file
   * @param {"fine-tune" | "user_data"} purpose of data and of models
   * @param {{progress: function(number), waiting: function(string)}} handlers
   */
  constructor(url, file, purpose, handlers) {
    this.url = url;
    this.file = file;
    this.purpose = purpose;
    this.handlers = handlers;
    this.controller = new AbortController();
  }

  /** Upload the file, and return the id of the stored file. Rejects with an `UploadError`, or when cancelled. */
  async run() {
    if (this.file.size === 0) throw new UploadError("The file is empty.");
    const { name, size, lastModified } = this.file;
    const isSame = (record) => record.name === name && record.size === size && record.lastModified === lastModified && record.purpose === this.purpose;
    const existing = unfinishedUploads().find(isSame);
    this.record = existing ?? (await this.start());
    try {
      return await this.finish();
    } catch (error) {
      const isRejected = error.status !== undefined && error.status !== 401;
      if (isRejected) discard(this.url, this.record);
      if (!existing || !GONE.includes(error.code)) throw error;
      this.record = await this.start();
      return this.finish();
    }
  }

  cancel() {
    this.controller.abort();
    if (this.record) discard(this.url, this.record);
  }

  async start() {
    const { name, size, lastModified } = this.file;
    const body = { filename: name, bytes: size, purpose: this.purpose, mime_type: "application/octet-stream" };
    const { id } = await this.persist(this.url, JSON.stringify(body));
    const record = { id, name, size, lastModified, purpose: this.purpose, partIds: [] };
    remember(record);
    return record;
  }

  /** Send the missing parts, and complete the upload. */
  async finish() {
    const { record } = this;
    for (let offset = storedBytes(record); offset < record.size; offset += PART_BYTES) {
      const body = new FormData();
      body.append("data", this.file.slice(offset, offset + PART_BYTES), "part");
      const part = await this.persist(`${this.url}/${record.id}/parts`, body, (sent) => this.handlers.progress(Math.min(record.size, offset + sent)));
      record.partIds.push(part.id);
      remember(record);
      this.handlers.progress(storedBytes(record));
    }
    const completed = await this.persist(`${this.url}/${record.id}/complete`, JSON.stringify({ part_ids: record.partIds }));
    forget(record);
    return completed.file.id;
  }

  /** Repeat a request until the service answers it. */
  async persist(url, body, progress) {
    for (let attempt = 0, seconds = FIRST_RETRY_SECONDS; ; attempt += 1, seconds = Math.min(LAST_RETRY_SECONDS, 2 * seconds)) {
      const { status, answer } = await send(url, body, { progress, attempt, signal: this.controller.signal });
      if (status >= 200 && status < 300) return answer;
      const message = answer?.error?.message;
      if (status === 401) connection.ended();
      if (!TEMPORARY.includes(status)) throw new UploadError(message ?? `The server answered ${status}.`, status, answer?.error?.code);
      if (status === 0) await this.requireReadable();
      this.handlers.waiting(message ?? "The connection was lost. The upload continues by itself.");
      await pause(seconds, this.controller.signal);
    }
  }

  /** A browser reports a file that has changed since it was chosen like a lost connection. */
  async requireReadable() {
    try {
      await this.file.slice(0, 1).arrayBuffer();
    } catch {
      throw new UploadError("The file can’t be read any more; choose it again.");
    }
  }
}

/** POST `body`; `status` is 0 if there is no response. Rejects when `signal` aborts. */
function send(url, body, { progress, attempt = 0, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open("POST", url);
    request.setRequestHeader("X-CSRF-Token", csrfToken);
    request.setRequestHeader("X-Stainless-Retry-Count", String(attempt)); // a repeated completion returns the file
    if (typeof body === "string") request.setRequestHeader("Content-Type", "application/json");
    if (progress) request.upload.addEventListener("progress", ({ loaded }) => progress(loaded));
    request.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    request.addEventListener("loadend", () => {
      signal?.removeEventListener("abort", abort);
      resolve({ status: request.status, answer: parsed(request.responseText) });
    });
    signal?.addEventListener("abort", abort);
    if (signal?.aborted) return abort(), reject(new DOMException("cancelled", "AbortError"));
    request.send(body);
  });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Wait, but at most until the browser is online again. */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      if (signal.aborted) reject(new DOMException("cancelled", "AbortError"));
      else resolve();
    };
    const timer = setTimeout(end, 1000 * seconds);
    addEventListener("online", end);
    signal.addEventListener("abort", end, { once: true });
  });
}
