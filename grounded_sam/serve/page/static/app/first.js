// Ask for what the first view shows while the other scripts are still being loaded.

import * as api from "./api.js";

/** Return the examples that are images. */
export function examplePictures(about) {
  return about.examples.filter((path) => !/\.(mp4|webm|mov|avi|mkv)$/i.test(path));
}

export const firstAbout = api.about();

/** The first example, sent and on its way to the browser; null if another view comes first. */
export const firstPicture = firstAbout
  .then(async (about) => {
    const [path] = examplePictures(about);
    if (!path || !["", "#try"].includes(location.hash)) return null;
    const picture = await api.addPicture(path);
    new Image().src = api.pictureUrl(picture.id);
    return picture;
  })
  .catch(() => null);
