// The page: four views, of which one is shown; the address says which.

import * as api from "./api.js";
import { BrowseView } from "./browse.js";
import { setPalette } from "./colors.js";
import { CompareView } from "./compare.js";
import { guarded, isTyping, tell } from "./dom.js";
import { firstAbout } from "./first.js";
import { TryView } from "./try.js";
import { VideoView } from "./video.js";

const NAMES = ["try", "video", "browse", "compare"];
const AUTHOR = "grounded_sam author";

class Router {
  constructor() {
    this.views = {};
    this.current = "try";
    this.started = new Set();
    addEventListener("hashchange", () => this.follow());
    const tabs = document.querySelector("[role=tablist]");
    tabs.addEventListener("keydown", (event) => this.tabKey(event));
    document.addEventListener("keydown", (event) => this.numberKey(event));
  }

  /** Who decides, as the store is told. */
  get author() {
    return document.getElementById("author")?.value.trim() ?? "";
  }

  go(name) {
    location.hash = name;
    this.follow();
  }

  follow() {
    const wanted = location.hash.slice(1);
    const name = NAMES.includes(wanted) ? wanted : "try";
    if (name !== this.current) tell(""); // what the view before said
    this.current = name;
    for (const other of NAMES) {
      const isShown = other === name;
      document.getElementById(`view-${other}`).hidden = !isShown;
      const tab = document.getElementById(`tab-${other}`);
      tab.setAttribute("aria-selected", String(isShown));
      tab.tabIndex = isShown ? 0 : -1;
    }
    const view = this.views[name];
    if (!view) return;
    if (this.started.has(name)) view.shown?.();
    else {
      this.started.add(name);
      view.start();
    }
  }

  /** Open an image of a store in Try. */
  async correct(store, id, from) {
    this.started.add("try");
    this.go("try");
    await this.views.try.stored.open(store, id, from);
  }

  tabKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = NAMES.indexOf(this.current) + step;
    this.go(NAMES[(at + NAMES.length) % NAMES.length]);
    document.getElementById(`tab-${this.current}`).focus();
    event.preventDefault();
  }

  numberKey(event) {
    if (event.key === "?" && !isTyping(event)) document.getElementById("keys").showModal();
  }
}

async function start() {
  const about = await firstAbout;
  setPalette(about.palette);
  const author = document.getElementById("author");
  author.value = localStorage.getItem(AUTHOR) || "";
  author.addEventListener("change", () => localStorage.setItem(AUTHOR, author.value.trim()));
  document.getElementById("models").textContent =
    [about.stages.detector, about.stages.segmenter].filter(Boolean).join(" + ") + `, ${about.device}`;
  for (const made of document.querySelectorAll("[data-opens]")) {
    made.addEventListener("click", () => document.getElementById(made.dataset.opens).showModal());
  }
  for (const made of document.querySelectorAll("dialog [data-closes]")) {
    made.addEventListener("click", () => made.closest("dialog").close());
  }
  const router = new Router();
  const makers = { try: TryView, video: VideoView, browse: BrowseView, compare: CompareView };
  for (const [name, View] of Object.entries(makers)) {
    router.views[name] = new View(document.getElementById(`view-${name}`), about, router);
  }
  router.follow();
  watch(about);
  document.documentElement.dataset.ready = "true";
  return router;
}

/** Wait until the models are loaded. */
async function watch(about) {
  while (!about.ready) {
    tell("The models are being loaded …", "busy");
    await new Promise((done) => setTimeout(done, 500));
    const now = await api.about().catch(() => null);
    if (now) Object.assign(about, now);
  }
}

guarded(async () => {
  const router = await start();
  globalThis.groundedSam = router; // for tests, and for the curious
});
