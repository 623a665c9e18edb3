"""Run the stages on images and videos.

`runner` takes frames from a source, passes them through a `pipeline.Pipeline`, and hands the results to the sinks.
Images go through `images.process_images`: detect, select boxes, add masks, select again. A box becomes a mask in
`images.DetectThenSegment.add_masks`. Videos go through `video.track_video`, which does the same at keyframes and lets a
tracker propagate the masks in between. Tracks are started, hidden and ended by `tracks.TrackManager`, whose `update`
ends those that were lost or hidden for too long; `backward` extends tracks to earlier frames. In a sweep,
`prediction_cache.CachedStages` stands in for `DetectThenSegment`.
"""
