// Choose an image or video: a file, something dropped or pasted, the camera, or an example.

import { button, el, guarded, tell } from "./dom.js";

/**
 * Put the buttons of a choice into an element.
 *
 * @param place Element for them.
 * @param options `kind` (image or video), `examples` (paths), `onchoose` (a File, or the path of an example).
 * @returns The buttons of the examples.
 */
export function makePicker(place, { kind, examples, onchoose }) {
  const named = kind === "image" ? "an image" : "a video";
    const input = el("input", {
    type: "file", accept: `${kind}/*`, class: "visually-hidden", tabindex: -1, "aria-label": `File of ${named}`,
    onchange: () => {
      if (input.files[0]) onchoose(input.files[0]);
      input.value = "";
    },
  });
  const shown = examples.map((path, i) =>
    button(`Example ${i + 1}`, () => onchoose(path), { class: "example", "aria-label": `Example ${i + 1}` }),
  );
  const isCamera = kind === "image" && navigator.mediaDevices?.getUserMedia;
  place.append(
    button(`Open ${named}`, () => input.click(), { class: "main" }),
    input,
    isCamera ? button("Camera", () => guarded(() => takePicture(onchoose))) : "",
    ...shown,
    el("span", { class: "hint" }, `or drop ${kind === "image" ? "one" : "it"} anywhere`),
  );
  return shown;
}

/** Take files that are dropped or pasted while `isActive()`. */
export function takeDrops(kind, isActive, onchoose) {
  const find = (transfer) => [...(transfer?.files || [])].find((file) => file.type.startsWith(`${kind}/`));
  document.addEventListener("dragover", (event) => {
    if (!isActive()) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    if (!isActive()) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    const file = find(event.dataTransfer);
    if (file) onchoose(file);
    else tell(`That is no ${kind} file.`, "error");
  });
  document.addEventListener("paste", (event) => {
    const file = isActive() ? find(event.clipboardData) : null;
    if (file) onchoose(file);
  });
}

/** Show the camera in a dialog, and hand over the image that is taken. */
async function takePicture(onchoose) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Error(`The camera cannot be used: ${error.message}`);
  }
  const video = el("video", { autoplay: true, playsinline: true, muted: true });
  video.srcObject = stream;
  const dialog = el("dialog", { "aria-label": "Camera", onclose: () => {
    stream.getTracks().forEach((track) => track.stop());
    dialog.remove();
  } }, video, el("p", {},
    button("Take the image", () => {
      const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => onchoose(new File([blob], "camera.png", { type: "image/png" })));
      dialog.close();
    }, { class: "main" }),
    button("Cancel", () => dialog.close())));
  document.body.append(dialog);
  dialog.showModal();
}
