-- Reads a result, with its images if these have at most `max_bytes` together, otherwise with their sizes.
--
-- args: id, max_bytes
-- returns: [meta, image or size, ...], or nil without a result

local key = result_key(args.id)
local reply, total = {redis.call('HGET', key, 'meta')}, 0
if not reply[1] then return false end
for index = 0, redis.call('HLEN', key) - 2 do
  local size = redis.call('HSTRLEN', key, 'image:' .. index)
  reply[index + 2], total = size, total + size
end
if total <= args.max_bytes then
  for index = 0, #reply - 2 do reply[index + 2] = redis.call('HGET', key, 'image:' .. index) end
end
return reply
