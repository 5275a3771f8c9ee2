-- Stores an image of a job's result to be served by URL, once.
--
-- args: id, token
-- blobs: data, media type

local id, file = args.id, PREFIX .. ':file:' .. args.token
if redis.call('EXISTS', file) == 1 then return end
redis.call('HSET', file, 'data', ARGV[2], 'type', ARGV[3])
redis.call('PEXPIRE', file, RESULT_TTL_MS)
redis.call('ZADD', KEPT_UNTIL, 'XX', now_ms() + RESULT_TTL_MS, id)
expire_kept()
