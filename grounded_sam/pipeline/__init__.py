"""Running the stages on images and videos."""
