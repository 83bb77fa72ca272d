"""What is learned from: shards, batches, and the tasks of GLUE, SuperGLUE and RACE."""
