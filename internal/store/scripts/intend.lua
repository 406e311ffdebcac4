#!lua
-- intend commits to presenting the refresh token.
--
-- arg: owner, fence, refresh (its id), horizon, most.
load()
local l, c = lease(), consent()
if not holds(l) then return reply('LOST') end
if not c or c.id ~= arg.refresh or tombstoned(c.id) then return reply('CHANGED') end
if settling() > 0 then return reply('SETTLING') end
local p = presentations(c.id)
if isMine(p) then
  touch()
  commit()
  return reply('OK')
end
if p.owner ~= '-' and p.ends > now then return reply('IN_DOUBT') end
if p.count >= tonumber(arg.most) and c.rotates ~= 'no' then return reply('SPENT') end
p.count, p.at, p.fence, p.ends, p.owner = p.count + 1, now, l.fence, now + tonumber(arg.horizon), arg.owner
putPresentations(p)
commit('intend')
return reply('OK')
