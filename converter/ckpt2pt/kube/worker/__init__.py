"""What a worker tells whoever started it, without a right in the cluster: how far it is, and how it ended.

Reporter --account--> numbers --endpoint--> GET /progress, /metrics     while it runs, best effort
'------termination--> /dev/termination-log     at the end, whatever the end
"""
