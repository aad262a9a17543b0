"""An embedded Ethereum node for development: one process, one block producer, JSON-RPC over HTTP and WebSocket.

It executes Prague rules with py-evm and keeps everything in one SQLite file. It knows nothing of the protocol's own
contracts, and it must never be reachable from other people's machines: its ten funded keys are public.

Run it with `python -m poip_chain.chain.devnet`, or from code with `poip_chain.chain.devnet.server.run`.
"""
