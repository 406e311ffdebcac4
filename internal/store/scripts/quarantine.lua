#!lua
-- quarantine takes a refresh token that was damaged out of the record, as if it
-- had been lost, and keeps the damaged bytes for people to look at. seed does not
-- put them back.
--
-- arg: id, sealed.
load('q:' .. arg.id)
local c = consent()
if c and c.id == arg.id and H.rt == arg.sealed then
  put('q:' .. arg.id, H.rt)
  put('r', nil)
  put('rt', nil)
  keep(now + 30 * day)
  commit('seed')
end
return reply('OK')
