// A page that was opened from a disk may start no worker, so there the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title>";
      this.inside = new Promise((ready) => {
        frame.onload = () => {
          const inner = frame.contentWindow;
          // What the script posts is for us, not for its own window.
          inner.postMessage = (data) => this.receive(data);
          inner.importScripts = (...urls) => Promise.all(urls.map((each) => load(inner.document, each)));
          load(inner.document, url).then(() => ready(inner));
        };
      });
      document.body.append(frame);
    }
    postMessage(data) {
      this.inside.then((inner) => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
    }
    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }
    terminate() {}
  };

  const load = (page, url) =>
    new Promise((done, failed) => {
      const script = page.createElement("script");
      Object.assign(script, { src: url, onload: done, onerror: failed });
      page.head.append(script);
    });
}
