"""A Hub by itself: `python -m hub_server PORT`, until it is interrupted."""

import sys

from . import TOKENS, Hub, open_port

hub = Hub(open_port(int(sys.argv[1])))
print(f"HF_ENDPOINT={hub.url} HF_TOKEN={TOKENS['anna']} HF_HUB_DISABLE_XET=1", flush=True)
hub.serve()
