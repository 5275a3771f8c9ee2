-- Stores a partial image.
--
-- args: id, epoch, image, index
-- blobs: data, grid
-- returns: 1, or 0 if the claim is lost

local id, data, grid = args.id, ARGV[2], ARGV[3]
if not holds(id, args.epoch) then return 0 end
local name = args.image .. ':' .. args.index
redis.call('HSET', partials_key(id), name, data, name .. ':grid', grid)
redis.call('PUBLISH', PREFIX .. ':events', '{"job":' .. cjson.encode(id) .. ',"partial":"' .. name .. '"}')
return 1
