-- Put before every script of this folder.
--
--   rate:{owner}         sorted set, one ticket per request, by its time; expires a minute after the last one
--   quota:{owner}:{day}  pixel-steps charged on that day (days since the epoch, UTC); expires with the day
--
-- Times are milliseconds of Redis' clock. The first write of a script that charges is one that Redis refuses when it is
-- out of memory, so a script is not stopped half way.
--
-- Arguments: ARGV[1] is a JSON object of named scalars, here `args`; None is left out and reads as nil.

local args = cjson.decode(ARGV[1])
local RATE, MINUTE_MS, DAY_MS = args.prefix .. ':rate:' .. args.owner, 60000, 86400000
local function quota_key(day) return args.prefix .. ':quota:' .. args.owner .. ':' .. day end
