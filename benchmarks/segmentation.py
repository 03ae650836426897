"""The paper's Table 8, semantic segmentation: `paper_tables.py --table 8`, with all its flags.

python benchmarks/segmentation.py --image-size 257
"""

import sys

import paper_tables

if __name__ == "__main__":
    sys.argv[1:1] = ["--table", "8"]
    paper_tables.main()
