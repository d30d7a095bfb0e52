"""From image files and annotations to batches; and the two data sets that come with the code."""
