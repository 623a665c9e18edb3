// Small helpers for the document. Text is always put in as text, so nothing in it can become markup.

/** Make an element: `on...` are listeners, `data` and `style` are objects, all else attributes. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(made.dataset, value);
    else if (key === "style") for (const [name, entry] of Object.entries(value)) made.style.setProperty(name, entry);
    else if (key === "value" || key === "checked" || key === "textContent") made[key] = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Make a button. */
export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

const status = document.getElementById("status");
let timer = 0;

/** Tell something that a screen reader reads too; errors stay until the next message. */
export function tell(text, kind = "note") {
  clearTimeout(timer);
  status.className = kind;
  status.setAttribute("role", kind === "error" ? "alert" : "status");
  status.textContent = text;
  if (text && kind !== "error" && kind !== "busy") timer = setTimeout(() => tell(""), 6000);
}

/** Run an action, and tell its error in words. */
export async function guarded(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message, "error");
    return undefined;
  }
}

/** Return a function that runs a while after its last call. */
export function debounce(action, delay) {
  let waiting = 0;
  return (...values) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => action(...values), delay);
  };
}

/** Give the user a file to save. */
export function save(content, name, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Copy a text, and say so. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    tell("Copied.");
  } catch {
    tell("The browser does not allow copying here: select the text and copy it.", "error");
  }
}

/** Return whether a key press belongs to a field that takes text or values, and not to a shortcut. */
export function isTyping(event) {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey) return true;
  if (target.matches("textarea, select")) return true;
  return target.matches("input") && !["checkbox", "radio", "button"].includes(target.type);
}

/** Return a count with its word: 1 object, 2 objects. */
export function countOf(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}
