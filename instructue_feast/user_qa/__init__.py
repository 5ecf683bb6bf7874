"""UserQA: what users did, as questions and answers. Pure Arrow and NumPy; Spark job and trainer both read it."""
