"""`quire up`: an LLMDeployment as local processes. A supervisor, not a second orchestrator.

console.py      what the person sees: one line per state change, progress bars
replica.py      one server process, from start to end
supervisor.py   one model: fetch, keep the wanted number of replicas, tell the gateway
runtime.py      all of it together: manifest file, models, gateway, signals
"""
