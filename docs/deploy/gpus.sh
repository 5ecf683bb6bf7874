#!/bin/sh
# Tells Spark which GPUs a host has: spark.worker.resource.gpu.discoveryScript, spark.executor.resource.gpu.discoveryScript
nvidia-smi --query-gpu=index --format=csv,noheader | awk '
  { addresses = addresses (NR > 1 ? ", " : "") "\"" $1 "\"" }
  END { print "{\"name\": \"gpu\", \"addresses\": [" addresses "]}" }'
