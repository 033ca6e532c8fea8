// A job's events as they happen, each once and in order, across lost connections and restarts of the server.

const FIRST_RETRY_SECONDS = 1;
const LAST_RETRY_SECONDS = 15;
const TYPES = ["status", "progress", "log", "checkpoint", "sample", "warning", "error"];

export class LiveEvents {
  /**
   * @param {string} url of the event stream
   * @param {number} after the seq of the last known event
   * @param {{event: function, end: function, lost: function, works: function}} handlers
   */
  constructor(url, after, handlers) {
    this.url = url;
    this.seq = after;
    this.handlers = handlers;
    this.retrySeconds = FIRST_RETRY_SECONDS;
    this.hasEnded = false;
    // Browsers allow six connections to a server, so hidden tabs close theirs. They continue after the last event.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    if (!document.hidden) this.open();
  }

  open() {
    if (this.source || this.hasEnded) return;
    clearTimeout(this.timer);
    this.source = new EventSource(`${this.url}?after=${this.seq}`);
    this.source.addEventListener("open", () => {
      this.retrySeconds = FIRST_RETRY_SECONDS;
      this.handlers.works();
    });
    for (const type of TYPES) this.source.addEventListener(type, (message) => this.receive(message));
    this.source.addEventListener("end", (message) => {
      this.hasEnded = true;
      this.close();
      this.handlers.end(JSON.parse(message.data));
    });
    // An "error" event of the stream itself has data; one of the connection has none.
    this.source.addEventListener("error", (message) => {
      if (message.data === undefined) this.retry();
    });
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = undefined;
  }

  retry() {
    this.close();
    if (document.hidden || this.hasEnded) return;
    this.handlers.lost();
    this.timer = setTimeout(() => this.open(), 1000 * this.retrySeconds);
    this.retrySeconds = Math.min(LAST_RETRY_SECONDS, 2 * this.retrySeconds);
  }

  receive(message) {
    if (message.data === undefined) return;
    const event = JSON.parse(message.data);
    if (event.seq <= this.seq) return;
    this.seq = event.seq;
    this.handlers.event(event);
  }
}
