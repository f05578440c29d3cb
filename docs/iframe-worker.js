/* The search of pages that are opened from disk. Browsers refuse a worker there, so the worker's script runs in a hidden frame,
   whose messages are handed on. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.listeners = new Promise((loaded) => {
        frame.addEventListener("load", () => {
          const inside = frame.contentWindow
          const listeners = []
          inside.addEventListener = (type, listener) => listeners.push(listener)
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = inside.document.createElement("script")
          script.src = url
          script.addEventListener("load", () => loaded(listeners))
          inside.document.body.append(script)
        }, { once: true })
      })
      document.body.append(frame)
    }
    async postMessage(data) {
      for (const listener of await this.listeners) listener({ data })
    }
  }
}
