"""onepass and torch train the same networks: `python -m onepass demo`, which has this file's options.

python examples/demo.py --plot demo.png
"""

import sys

from onepass._cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
