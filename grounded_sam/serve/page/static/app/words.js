// The words to look for, as chips: a word starting with ! is a negative, and an ontology can be pasted.

import { button, el, tell } from "./dom.js";
import { colorOf } from "./colors.js";

export class Words {
  /**
   * @param place Element that the field is put into.
   * @param onchange Called after every change.
   */
  constructor(place, id, onchange) {
    this.onchange = onchange;
    this.words = [];
    this.ontology = null;
    this.input = el("input", {
      id, type: "text", autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-help`,
      onkeydown: (event) => this.keyDown(event), onpaste: (event) => this.paste(event), onblur: () => this.commit(),
    });
    this.chips = el("ul", { class: "chips", "aria-label": "Words" });
    const help = "Enter adds a word; !word leaves out what looks like it; an ontology (JSON or YAML) can be pasted.";
    place.append(
      el("div", { class: "chip-field", onclick: (event) => event.target === event.currentTarget && this.input.focus() },
        this.chips, this.input),
      el("p", { id: `${id}-help`, class: "hint" }, help),
    );
    this.draw();
  }

  keyDown(event) {
    if (["Enter", ",", ";"].includes(event.key) && this.input.value.trim()) {
      event.preventDefault();
      this.commit();
    } else if (event.key === "Backspace" && !this.input.value && this.words.length) {
      this.remove(this.words.length - 1);
    }
  }

  commit() {
    const text = this.input.value;
    this.input.value = "";
    if (text.trim()) this.add(text);
  }

  paste(event) {
    const text = event.clipboardData.getData("text");
    if (isOntology(text)) {
      event.preventDefault();
      this.setOntology(text);
    } else if (/[\n,;]/.test(text)) {
      event.preventDefault();
      this.add(text);
    }
  }

  setOntology(text) {
    let content = text;
    try {
      content = JSON.parse(text);
    } catch {
      // YAML, which the server reads
    }
    [this.ontology, this.words] = [content, []];
    this.changed();
  }

  /** Add words, separated by commas or lines. */
  add(text) {
    if (this.ontology) {
      tell("Remove the ontology to type words.", "error");
      return;
    }
    for (const part of text.split(/[\n,;]/)) {
      const word = part.trim();
      if (word.replace("!", "").trim() && !this.words.includes(word)) this.words.push(word);
    }
    this.changed();
  }

  set(words) {
    [this.words, this.ontology] = [[...words], null];
    this.draw();
  }

  remove(index) {
    this.words.splice(index, 1);
    this.changed();
    this.input.focus();
  }

  changed() {
    this.draw();
    this.onchange();
  }

  draw() {
    const chip = (text, label, color, onremove, kind) =>
      el("li", { class: `chip ${kind}`, style: color ? { "--color": color } : {} }, text,
        button("×", onremove, { "aria-label": `Remove ${label}`, title: `Remove ${label}` }));
    const chips = this.words.map((word, i) => {
      const isNegative = word.startsWith("!");
      const name = isNegative ? word.slice(1).trim() : word;
      const color = isNegative ? null : colorOf(name, this.classes.indexOf(name));
      return chip(isNegative ? `not ${name}` : name, name, color, () => this.remove(i), isNegative ? "negative" : "");
    });
    if (this.ontology) {
      chips.push(chip("pasted ontology", "the ontology", null, () => this.set([]) || this.onchange(), "ontology"));
    }
    this.chips.replaceChildren(...chips);
    this.input.placeholder = chips.length ? "add a word" : "what to look for, such as green star";
  }

  /** The names of the classes; of a pasted ontology they are known after the answer. */
  get classes() {
    return this.words.filter((word) => !word.startsWith("!"));
  }

  get negatives() {
    return this.words.filter((word) => word.startsWith("!")).map((word) => word.slice(1).trim());
  }

  get isEmpty() {
    return !this.ontology && !this.classes.length;
  }

  /** What a request has as `text` and `negatives`. */
  get request() {
    if (this.ontology) return { text: this.ontology };
    return { text: this.classes, ...(this.negatives.length ? { negatives: this.negatives } : {}) };
  }
}

function isOntology(text) {
  return text.trim().startsWith("{") || (text.includes("\n") && /^\s*[\w "'-]+:(\s|$)/m.test(text));
}
