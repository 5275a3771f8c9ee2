-- Takes the first preview whose job is still planned under the claim that offered it.
--
-- returns: nil, or [id, epoch, image, grid, spec, deadline, now]

while true do
  local offer = redis.call('LPOP', PREFIX .. ':previews')
  if not offer then return false end
  local epoch, image, id, grid = string.match(offer, '^(%d+) (%d+) ([^\n]*)\n(.*)$')
  if id and holds(id, tonumber(epoch)) then
    local spec, deadline = unpack(redis.call('HMGET', job_key(id), 'spec', 'deadline'))
    return {id, tonumber(epoch), tonumber(image), grid, spec, deadline, now_ms()}
  end
end
