"""Images from arrays, folders and files, in memory or streamed."""
