"""The entry point of a Ray job that is submitted by hand, with the recipes beside it:

    ray job submit --working-dir jobs -- python finetune.py resnet50-swa5.yaml --set output.dir=s3://BUCKET/runs

It is `swa-dist finetune` on the cluster that the job is in. `swa-dist submit` needs neither this nor a working folder.
"""

import sys

from swa_dist.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["finetune", "--set", "cluster.address=auto"]
    main()
