-- Offers a preview to the renderers while its job is planned. The oldest offers give way: whoever renders the job makes up
-- for a lost preview.
--
-- args: id, epoch, image
-- blobs: grid
-- returns: 1, or 0 if the claim is lost

local MAX_OFFERS = 64
if not holds(args.id, args.epoch) then return 0 end
local previews = PREFIX .. ':previews'
redis.call('RPUSH', previews, string.format('%d %d ', args.epoch, args.image) .. args.id .. '\n' .. ARGV[2])
redis.call('LTRIM', previews, -MAX_OFFERS, -1)
redis.call('PEXPIRE', previews, RESULT_TTL_MS)
redis.call('PUBLISH', previews, args.id)
return 1
