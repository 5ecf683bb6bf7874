"""UserQA: what users did, as questions and answers. Pure Arrow and NumPy; the Spark job and the trainer both read it."""
