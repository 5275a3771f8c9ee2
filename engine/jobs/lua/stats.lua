-- returns: [waiting, running, source bytes, dead-lettered, bytes kept, live jobs to plan, live jobs to render]

local function length(stage)
  local sum = 0
  for _, priority in ipairs(PRIORITIES) do
    local entries = redis.pcall('XLEN', queue_key(priority, stage)) -- an error, of another type, is a table
    sum = sum + (tonumber(entries) or 0)
  end
  return sum
end

return {
  redis.call('ZCARD', WAITING), redis.call('SCARD', RUNNING),
  tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0), tonumber(redis.call('HGET', COUNTERS, 'given_up') or 0),
  tonumber(redis.call('HGET', KEPT_TOTAL, 'bytes') or 0), length(), length('render')}
